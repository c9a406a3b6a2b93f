"""The matrices of a model directory's linear layers, read from the headers of its weights. No torch."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LONGEST_HEADER: Final = 100 * 1024 * 1024


class NoLinears(ValueError):
    """No safetensors with matrices in it."""


@dataclass(frozen=True, slots=True)
class Linears:
    """What a forward multiplies with."""

    layers: tuple[tuple[int, int], ...]
    """[outputs, inputs] of all matrices every token passes, in the order of the layers."""
    head: tuple[int, int]
    """[vocabulary, hidden]: passed only by the rows that get a token."""

    @property
    def weights(self) -> int:
        """Weights read for one token that gets a successor."""
        return sum(math.prod(shape) for shape in (*self.layers, self.head))

    def flops(self, tokens: int, sampled: int) -> float:
        """Operations of the matrix products for so many tokens, of which some are sampled after."""
        inner = sum(math.prod(shape) for shape in self.layers)
        return 2.0 * (tokens * inner + sampled * math.prod(self.head))


def read_linears(directory: Path) -> Linears:
    """Find the matrices of a model.

    Raises:
        NoLinears: there are none that could be understood.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shapes |= _shapes(path)
    matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}
    embeddings = [name for name in matrices if "embed" in name]
    heads = [name for name in matrices if name.endswith("lm_head.weight")]
    named = heads or embeddings[:1]  # where they are tied, the embedding is the head
    inner = {name: shape for name, shape in matrices.items() if name not in (*embeddings, *heads)}
    if not named or not inner:
        raise NoLinears(f"{directory}: no weights of linear layers found")
    ordered = sorted(inner, key=_by_layer)
    return Linears(tuple(inner[name] for name in ordered), matrices[named[0]])


def _by_layer(name: str) -> tuple[int, str]:
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1), name


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a safetensors header: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise NoLinears(f"{path}: not safetensors")
        header = json.loads(file.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
