"""How the rows of one step share attention calls: pure decisions over slots and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CALL_TOKENS = 64  # keys one more row may be padded by, rather than cost another attention call
PAD_RATIO = 0.25  # of the keys needed, that may be read for nothing


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows [row, row + count) of the step: one token each, of requests in consecutive slots.

    Attributes:
        row: first row.
        count: rows.
        slot: slot of the first row; row i has slot + i.
        lengths: keys of each row, its own token's included.
    """

    row: int
    count: int
    slot: int
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Keys of the longest row; the others are padded to it."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [row, row + count) of the step: tokens [start, start + count) of the request in `slot`."""

    row: int
    count: int
    slot: int
    start: int

    @property
    def stop(self) -> int:
        """Keys the chunk's last token sees."""
        return self.start + self.count


def decode_groups(rows: Sequence[tuple[int, int]]) -> list[DecodeGroup]:
    """Split rows into groups that one attention call serves: neighbours in the pool with similar lengths.

    Args:
        rows: (slot, keys) of every row, slots ascending.
    """
    groups: list[DecodeGroup] = []
    first = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end][0] == rows[end - 1][0] + 1 and _similar([n for _, n in rows[first : end + 1]]):
            continue
        lengths = tuple(length for _, length in rows[first:end])
        groups.append(DecodeGroup(first, end - first, rows[first][0], lengths))
        first = end
    return groups


def _similar(lengths: Sequence[int]) -> bool:
    needed = sum(lengths)
    padding = max(lengths) * len(lengths) - needed
    return padding <= PAD_RATIO * needed + CALL_TOKENS * (len(lengths) - 1)
