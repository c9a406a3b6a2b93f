"""What lies in the pool, and which of it is known to be finite: only that may stay in a free slot, or be shared.

Attention reads past a short neighbour's last token and gives what it finds there weight 0, which does not help against
NaN. And a prefix that others share must be one that gave its own request its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.engine.layout import LayerSpec
from baton.engine.messages import Role
from baton.engine.pool import Pool
from baton.engine.request import Request
from baton.engine.slots import Copy, Operation


class Memory:
    """The pool, changed as the slots' operations say, and what is proven of it.

    Args:
        pool: of the engine.
        layers: of the model.
    """

    def __init__(self, pool: Pool, layers: tuple[LayerSpec, ...]) -> None:
        self._pool = pool
        self._computed_kinds = layers[-1:]
        self._received_kinds = tuple({(layer.window, layer.chunk): layer for layer in layers}.values())

    def carry_out(self, operations: Iterable[Operation]) -> None:
        """What was decided about slots, in its order."""
        for operation in operations:
            if isinstance(operation, Copy):
                self._pool.copy(operation.source, operation.target, operation.tokens)
                continue
            if operation.foreign and not operation.clean:
                self._pool.touch(operation.slot, self._pool.layout.slot_tokens)
            self._pool.release(operation.slot, clean=operation.clean, kept=operation.kept)

    def sampled(self, request: Request) -> None:
        """A token was sampled after all that is computed: NaN in sight of its row would have failed the request.

        Where all was computed here, NaN of an earlier layer is in the last one's keys too, so that only its sight
        counts. Where layers that see a window got no more than it from elsewhere, what they lack is never proven, and
        so never kept for a shorter prefix that would need it.
        """
        kinds = self._received_kinds if request.role is Role.RECEIVE else self._computed_kinds
        if request.proven >= max(kind.first_seen(request.computed - 1) for kind in kinds):
            request.proven = request.computed

    def inspect(self, request: Request) -> None:
        """It ends, and no token was sampled that saw it all: look at what it leaves, where that was computed here."""
        unproven = request.proven < request.computed and request.role is not Role.RECEIVE
        if unproven and self._pool.finite(request.slot, request.proven, request.computed):
            request.proven = request.computed
