"""Who has read KV out of shared memory knows by itself whether it was still held; and who knows a pool need not ask."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.handoff import leases as leases_module
from baton.handoff import shm
from baton.handoff.cost import Handoff
from baton.handoff.leases import LeaseTable, LeaseView
from baton.handoff.receiver import KvReceiver
from baton.handoff.reception import Reception
from baton.handoff.sender import KvSender
from baton.handoff.sources import Sources
from baton.handoff.wire import HandoffCorrupt
from baton.internal.v1 import prefill_pb2
from baton.v1 import inference_pb2

LAYOUT = PoolLayout.build((LayerSpec(key="0", heads=2, key_dim=8, value_dim=8),), KvDtype.FLOAT32, 2, 64)
SHM, GRPC = inference_pb2.TRANSPORT_SHM, inference_pb2.TRANSPORT_GRPC


def test_a_lease_holds_as_long_as_its_block_and_never_again() -> None:
    table = LeaseTable()
    view = LeaseView(table.fd)
    with table.hold() as first, table.hold() as second:
        assert first is not None
        assert second is not None
        assert first.index != second.index
        assert view.held(first)
        assert view.held(second)
    assert not view.held(first)
    with table.hold() as third:
        assert third is not None
        assert third.index in (first.index, second.index), "words are used again"
        assert view.held(third)
        assert not view.held(first)
        assert not view.held(second), "for another call than before"
    assert not view.held(prefill_pb2.Lease()), "no lease"
    assert not view.held(prefill_pb2.Lease(index=third.index, value=0)), "nor one that anybody could have"
    assert not view.held(prefill_pb2.Lease(index=1 << 30, value=1))
    view.close()
    table.close()


def test_a_table_that_is_full_lends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "_WORDS", 1)
    table = LeaseTable()
    with table.hold() as only:
        assert only is not None
        with table.hold() as none:
            assert none is None
    with table.hold() as again:
        assert again is not None
    table.close()


def test_a_table_that_could_be_taken_away_is_not_looked_at() -> None:
    fd = os.memfd_create("leased", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="taken away"):
        LeaseView(fd)
    os.close(fd)


class Lent:
    """A prefill service's pool, full, and the table of leases lent with it."""

    def __init__(self, memory: mmap.mmap, offer: prefill_pb2.SharedMemory, leases: LeaseTable) -> None:
        self.memory = memory
        self.offer = offer
        self.leases = leases

    def accepted(self, lease: prefill_pb2.Lease | None, *, chosen: bool) -> prefill_pb2.PrefillAccepted:
        said = prefill_pb2.PrefillAccepted(transports=[SHM, GRPC], shared_memory=self.offer, lease=lease)
        if chosen:
            said.chosen = SHM
        return said


@asynccontextmanager
async def lent(directory: Path) -> AsyncIterator[Lent]:
    fd = os.memfd_create("leased", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAYOUT.total_bytes)
    table = LeaseTable()
    memory = mmap.mmap(fd, LAYOUT.total_bytes)  # closed when nobody looks at it any more
    memory[:] = os.urandom(LAYOUT.total_bytes)
    async with shm.lending(directory, fd, table) as offer:
        yield Lent(memory, offer, table)
    table.close()
    os.close(fd)


class Borrower:
    """A decode service that waits for the KV of 40 tokens."""

    def __init__(self, directory: Path) -> None:
        self.own = bytearray(LAYOUT.total_bytes)
        self.sources = Sources(memoryview(self.own), directory)

    def reception(self) -> Reception:
        receiver = KvReceiver(LAYOUT, memoryview(self.own), 1, 0, 40, 0)
        return Reception(receiver, self.sources, (SHM, GRPC), Handoff())


async def said(reception: Reception) -> list[prefill_pb2.PrefillRequest]:
    """What the prefill service hears until the caller has closed its side."""
    return [request async for request in reception.requests(prefill_pb2.Start())]


async def places(sender: KvSender) -> prefill_pb2.KvRanges:
    """All of them, in one message, for the first token is out."""
    sender.ready(0, 0, 0, 40)
    sender.finish()
    sender.close()
    (message,) = [message async for message in sender.messages()]
    assert isinstance(message, prefill_pb2.PrefillResponse)
    assert message.ranges.sent == sender.done()
    return message.ranges


async def test_a_pool_that_is_known_needs_no_choice_and_kv_that_is_held_no_done(tmp_path: Path) -> None:
    borrower = Borrower(tmp_path)
    async with lent(tmp_path) as pool:
        for known in (False, True):
            assert borrower.sources.mapped(pool.offer.name) == known
            borrower.own[:] = bytes(len(borrower.own))
            sender = KvSender(LAYOUT, memoryview(pool.memory), 40, 0)
            sender.choose(SHM)
            reception = borrower.reception()
            hearing = asyncio.create_task(said(reception))
            with pool.leases.hold() as lease:
                await reception.accepted(pool.accepted(lease, chosen=known))
                assert await reception.ranges(await places(sender)), "it may be used at once"
            heard = [request.WhichOneof("message") for request in await hearing]
            assert heard == (["start"] if known else ["start", "choice"])
            assert reception.memory == pool.offer.name
            for (target, size), (source, _) in zip(LAYOUT.spans(0, 1, 0, 40), LAYOUT.spans(0, 0, 0, 40), strict=True):
                assert borrower.own[target : target + size] == pool.memory[source : source + size]
    borrower.sources.close()
    assert not borrower.sources.mapped(pool.offer.name)


@pytest.mark.parametrize("lease", ["ended", "none"])
async def test_kv_that_may_have_changed_under_the_reader_waits_for_done(tmp_path: Path, lease: str) -> None:
    borrower = Borrower(tmp_path)
    async with lent(tmp_path) as pool:
        sender = KvSender(LAYOUT, memoryview(pool.memory), 40, 0)
        sender.choose(SHM)
        reception = borrower.reception()
        with pool.leases.hold() as held:
            await reception.accepted(pool.accepted(held if lease == "ended" else None, chosen=True))
        assert not await reception.ranges(await places(sender))
    borrower.sources.close()


async def test_what_was_sent_in_all_is_compared_with_what_came(tmp_path: Path) -> None:
    borrower = Borrower(tmp_path)
    async with lent(tmp_path) as pool:
        sender = KvSender(LAYOUT, memoryview(pool.memory), 40, 0)
        sender.choose(SHM)
        ranges = await places(sender)
        ranges.sent.checksum += 1
        reception = borrower.reception()
        with pool.leases.hold() as lease:
            await reception.accepted(pool.accepted(lease, chosen=True))
            with pytest.raises(HandoffCorrupt, match="not the KV sent"):
                await reception.ranges(ranges)
    borrower.sources.close()
