"""What `baton.bench.handoff` hands over."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout

BYTES_METHOD = "/baton.bench.Bytes/Stream"
EMPTY_METHOD = "/baton.bench.Bytes/Empty"
LATE = "late"
"""Request id of a handoff whose KV becomes ready so long after its call began, as after a prompt's computation."""
LATE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of one prompt of a model, in bfloat16.

    Attributes:
        tokens: of the prompt.
        step_tokens: that become ready at a time, layer by layer, as in an engine's step.
        layers, heads, dim: of the model: KV heads, and elements of one's key.
    """

    tokens: int = 2048
    step_tokens: int = 256
    layers: int = 12
    heads: int = 4
    dim: int = 64

    @property
    def bytes(self) -> int:
        """KV bytes of the prompt."""
        return self.tokens * self.layout().bytes_per_token

    def layout(self) -> PoolLayout:
        """A pool with room for the prompt."""
        layers = tuple(
            LayerSpec(key=str(i), heads=self.heads, key_dim=self.dim, value_dim=self.dim) for i in range(self.layers)
        )
        return PoolLayout.build(layers, KvDtype.BFLOAT16, 1, self.tokens)

    def to_json(self) -> str:
        """For the other process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shape:
        """What `to_json` made."""
        return cls(**json.loads(text))
