"""Pages are given out once, shared by count, and all come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.engine.cuda.pages import TRASH, Pages, pages_needed
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.streams import HostStreams
from baton.engine.errors import EngineError
from baton.engine.layout import KvDtype, LayerSpec, PoolLayout

SLOTS, SLOT_TOKENS = 4, 37
LAYERS = (
    LayerSpec(key="0", heads=1, key_dim=2, value_dim=3),
    LayerSpec(key="1", heads=2, key_dim=1, value_dim=1),
)


class PoolMachine(RuleBasedStateMachine):
    """A pool against lists: what a slot was given is what is found there, whoever shares its pages."""

    @initialize(page_size=st.sampled_from([1, 4, 16, 64]))
    def start(self, page_size: int) -> None:
        layout = PoolLayout.build(LAYERS, KvDtype.FLOAT32, SLOTS, SLOT_TOKENS)
        capacity = SLOTS * SLOT_TOKENS
        self.pool = PagedPool(layout, capacity, page_size, torch.device("cpu"), HostStreams())
        self.total = pages_needed(capacity, page_size, SLOTS)
        self.model: list[list[float]] = [[] for _ in range(SLOTS)]
        self.next = 1.0

    @rule(slot=st.integers(0, SLOTS - 1), back=st.integers(0, 40), count=st.integers(1, SLOT_TOKENS))
    def write(self, slot: int, back: int, count: int) -> None:
        """Tokens after the slot's own, or some of these again."""
        first = max(0, len(self.model[slot]) - back)
        stop = min(SLOT_TOKENS, first + count)
        self.pool.prepare(slot, first, stop)
        places = torch.from_numpy(self.pool.pages.places(slot, first, stop)).long()
        values = torch.arange(stop - first) + self.next
        for pages in (*self.pool.key_pages, *self.pool.value_pages):
            pages.flatten(0, 1)[places] = values.view(-1, 1, 1).expand(-1, *pages.shape[2:])
        self.model[slot][first:] = values.tolist()
        self.next += 1000.0

    @rule(source=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1), share=st.floats(0, 1))
    def copy(self, source: int, other: int, share: float) -> None:
        tokens = int(share * len(self.model[source]))
        self.pool.copy(source, other, tokens)
        if source != other:
            self.model[other] = self.model[source][:tokens]

    @rule(slot=st.integers(0, SLOTS - 1), kept=st.integers(0, 10), clean=st.booleans())
    def release(self, slot: int, kept: int, clean: bool) -> None:
        self.pool.release(slot, clean=clean, kept=kept)
        self.model[slot] = self.model[slot][:kept]

    @precondition(lambda self: any(self.model))
    @rule(data=st.data())
    def through_the_file(self, data: st.DataObject) -> None:
        """Down from one slot and up again changes nothing."""
        slot = data.draw(st.sampled_from([i for i, tokens in enumerate(self.model) if tokens]))
        first = data.draw(st.integers(0, len(self.model[slot]) - 1))
        for layer in range(len(LAYERS)):
            self.pool.download(layer, slot, first, len(self.model[slot])).synchronize()
        assert self.pool.keys[0][slot, first : len(self.model[slot]), 0, 0].tolist() == self.model[slot][first:]
        places = torch.from_numpy(self.pool.pages.places(slot, first, len(self.model[slot]))).long()
        for pages in (*self.pool.key_pages, *self.pool.value_pages):
            if all(self.pool.pages.references(int(place) // pages.shape[1]) == 1 for place in places):
                pages.flatten(0, 1)[places] = torch.nan
        self.pool.upload(slot, first, len(self.model[slot]))

    @invariant()
    def slots_hold_what_they_were_given(self) -> None:
        for slot, tokens in enumerate(self.model):
            places = torch.from_numpy(self.pool.pages.places(slot, 0, len(tokens))).long()
            for pages in (*self.pool.key_pages, *self.pool.value_pages):
                assert pages.flatten(0, 1)[places].flatten(1)[:, :1].flatten().tolist() == tokens
            assert self.pool.finite(slot, 0, len(tokens))

    @invariant()
    def pages_are_counted(self) -> None:
        pages = self.pool.pages
        held = [int(page) for slot in range(SLOTS) for page in pages.tables[slot, : pages.held(slot)]]
        assert TRASH not in held
        assert all(held.count(page) == pages.references(page) for page in set(held))
        assert pages.free == self.total - len(set(held))
        assert all(not pages.tables[slot, pages.held(slot) :].any() for slot in range(SLOTS))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for slot in range(SLOTS):
                self.pool.release(slot, clean=True)
            assert self.pool.pages.free == self.total


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_prefix_costs_no_page() -> None:
    pages = Pages(8, 4, 3, 16)
    pages.prepare(0, 0, 10)
    assert pages.share(0, 1, 8) == []
    assert (pages.free, pages.held(1)) == (5, 2)
    (copy,) = pages.share(0, 2, 9)
    assert copy == (pages.tables[0, 2], pages.tables[2, 2], 1)
    assert pages.free == 4


def test_a_shared_page_is_left_to_the_others() -> None:
    pages = Pages(8, 4, 2, 16)
    pages.prepare(0, 0, 8)
    pages.share(0, 1, 8)
    before = pages.tables[0].copy()
    (copy,) = pages.prepare(1, 6, 9)
    assert copy == (before[1], pages.tables[1, 1], 4)
    assert (pages.tables[0] == before).all()
    assert pages.tables[1, 0] == before[0]
    assert pages.prepare(1, 6, 9) == [], "it is its own now"


def test_what_is_overwritten_as_a_whole_is_not_copied() -> None:
    pages = Pages(8, 4, 2, 16)
    pages.prepare(0, 0, 8)
    pages.share(0, 1, 8)
    assert pages.prepare(1, 4, 8) == []
    assert pages.tables[1, 1] != pages.tables[0, 1]


def test_more_pages_than_there_are_and_more_tokens_than_a_slot_has() -> None:
    pages = Pages(2, 4, 2, 16)
    pages.prepare(0, 0, 8)
    with pytest.raises(EngineError, match="no page is free"):
        pages.prepare(1, 0, 1)
    with pytest.raises(IndexError):
        pages.share(0, 1, 9)


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_pages_suffice_however_tokens_are_spread(page_size: int) -> None:
    """The scheduler counts tokens, not pages."""
    for spread in ([100, 1, 1, 1], [26, 26, 26, 25], [103, 0, 0, 0], [0, 17, 17, 69]):
        pages = Pages(pages_needed(103, page_size, 4), page_size, 4, 128)
        for slot, tokens in enumerate(spread):
            pages.prepare(slot, 0, tokens)


class Locking(HostStreams):
    """Notes what is page-locked."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def register(self, address: int, size: int) -> bool:
        self.locked[address] = size
        return True

    def unregister(self, address: int) -> None:
        del self.locked[address]


def test_a_page_locked_file_is_never_given_back_in_part() -> None:
    """The device goes on writing to the memory it was told of, whatever the file holds by then."""
    streams = Locking()
    layout = PoolLayout.build(LAYERS, KvDtype.FLOAT32, SLOTS, 4096)
    pool = PagedPool(layout, 0, 16, torch.device("cpu"), streams)  # no budget: a CPU pool would give back at once
    assert list(streams.locked.values()) == [layout.total_bytes]
    pool.keys[0][1] = 7.0
    pool.touch(1, 4096)
    pool.release(1, clean=False)
    assert (pool.keys[0][1] == 7.0).all()
    del pool
    assert not streams.locked


def test_a_file_too_large_to_lock_is_not_locked() -> None:
    streams = Locking()
    layer = LayerSpec(key="0", heads=64, key_dim=128, value_dim=128)
    # Sparse: it takes no memory until it is written.
    layout = PoolLayout.build((layer,) * 32, KvDtype.FLOAT32, 256, 1 << 16)
    assert layout.total_bytes > 1 << 40
    pool = PagedPool(layout, 0, 256, torch.device("meta"), streams)
    assert not pool.registered
    assert not streams.locked


class Late(HostStreams):
    """Copies that are over when somebody waits for them."""

    def __init__(self) -> None:
        self.waited = 0

    def record(self) -> Late:
        return self

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.waited += 1


def test_a_slot_is_free_once_nothing_leaves_it_any_more() -> None:
    """Its next holder's front may write to the file at once."""
    streams = Late()
    layout = PoolLayout.build(LAYERS, KvDtype.FLOAT32, SLOTS, SLOT_TOKENS)
    pool = PagedPool(layout, SLOTS * SLOT_TOKENS, 16, torch.device("cpu"), streams)
    for slot in range(2):
        pool.prepare(slot, 0, 5)
    pool.download(0, 0, 0, 5)
    pool.release(1, clean=True)
    assert streams.waited == 0
    pool.release(0, clean=True)
    assert streams.waited == 1
