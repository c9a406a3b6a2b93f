"""What a worker's prefix cache holds, as far as it told this router. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.internal.v1 import worker_pb2


class Gap(Exception):
    """A message is missing: what is known of the cache is void."""


class KnownPrefixes:
    """Blocks by the router's digests. A worker never has a block without those before it.

    Attributes:
        block_tokens: tokens of a block; 0: nothing was told.
    """

    def __init__(self) -> None:
        self.block_tokens = 0
        self._blocks: set[int] = set()
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def told(self) -> bool:
        """Whether the worker tells what its cache holds; if not, nothing is known of it."""
        return self._sequence > 0

    def take(self, changes: worker_pb2.PrefixChanges, most: int) -> None:
        """Account for what a worker told.

        Args:
            changes: the next ones.
            most: blocks it can hold; what it tells beyond that is not believed.

        Raises:
            Gap: they are not the next ones.
        """
        if changes.snapshot:
            self._blocks.clear()
        elif changes.sequence != self._sequence + 1:
            raise Gap(f"changes {changes.sequence} follow {self._sequence}")
        self._sequence = changes.sequence
        self.block_tokens = changes.block_tokens
        self._blocks.difference_update(changes.removed)
        self._blocks.update(changes.added[: max(0, most - len(self._blocks))])

    def forget(self) -> None:
        """Nothing is known any more."""
        self._blocks.clear()
        self._sequence = 0

    def depth(self, chain: Sequence[int]) -> int:
        """How many of a prompt's first blocks are there: a search by halves."""
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in self._blocks:
                low = middle + 1
            else:
                high = middle
        return low
