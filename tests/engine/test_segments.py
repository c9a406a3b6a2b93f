"""Rows that share an attention call are neighbours in the pool, and little is read for nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.segments import CALL_TOKENS, PAD_RATIO, Chunk, decode_groups


@st.composite
def decode_rows(draw: st.DrawFn) -> list[tuple[int, int]]:
    slots = sorted(draw(st.sets(st.integers(0, 40), max_size=30)))
    near = st.integers(1, 60) | st.integers(1, 4000)
    return [(slot, draw(near)) for slot in slots]


@given(rows=decode_rows())
def test_every_row_is_in_one_group_in_order(rows: list[tuple[int, int]]) -> None:
    covered = [
        (group.row + i, group.slot + i, length)
        for group in decode_groups(rows)
        for i, length in enumerate(group.lengths)
    ]
    assert covered == [(row, slot, length) for row, (slot, length) in enumerate(rows)]
    assert all(group.count == len(group.lengths) >= 1 for group in decode_groups(rows))


@given(rows=decode_rows())
def test_padding_is_bounded(rows: list[tuple[int, int]]) -> None:
    for group in decode_groups(rows):
        needed = sum(group.lengths)
        padding = group.longest * group.count - needed
        assert padding <= PAD_RATIO * needed + CALL_TOKENS * (group.count - 1)


@given(slot=st.integers(0, 5), count=st.integers(1, 20), length=st.integers(1, 3000))
def test_neighbours_of_equal_length_share_one_call(slot: int, count: int, length: int) -> None:
    assert len(decode_groups([(slot + i, length) for i in range(count)])) == 1


def test_groups_break_at_gaps_and_at_very_different_lengths() -> None:
    rows = [(0, 10), (1, 12), (3, 12), (4, 2000), (5, 1990)]
    assert [(g.slot, g.lengths) for g in decode_groups(rows)] == [(0, (10, 12)), (3, (12,)), (4, (2000, 1990))]


def test_nothing_to_decode() -> None:
    assert decode_groups([]) == []


def test_a_chunk_sees_up_to_its_own_last_token() -> None:
    assert Chunk(row=3, count=5, slot=1, start=20).stop == 25
