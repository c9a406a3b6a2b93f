"""A pool is lent to who knows name and token, for reading, and is gone with its lender."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.handoff import shm
from baton.handoff.leases import LeaseTable
from baton.handoff.receiver import Piece
from baton.handoff.sources import SharedMemorySource, Sources
from baton.handoff.transport import TransportFailed
from baton.internal.v1 import prefill_pb2
from baton.v1 import inference_pb2

SIZE = 4 * mmap.PAGESIZE


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "meeting"


@asynccontextmanager
async def lender(directory: Path) -> AsyncIterator[tuple[prefill_pb2.SharedMemory, mmap.mmap]]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as memory:
        leases = LeaseTable()
        async with shm.lending(directory, fd, leases) as offer:
            yield offer, memory
        leases.close()
        os.close(fd)


def accepted(offer: prefill_pb2.SharedMemory) -> prefill_pb2.PrefillAccepted:
    return prefill_pb2.PrefillAccepted(shared_memory=offer)


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_what_is_lent_is_read_and_nothing_else(directory: Path) -> None:
    async with lender(directory) as (offer, memory):
        memory[100:110] = b"0123456789"
        own = bytearray(50)
        sources = Sources(memoryview(own), directory)
        source = await sources.open(inference_pb2.TRANSPORT_SHM, accepted(offer))
        assert isinstance(source, SharedMemorySource)
        await source.read([Piece(100, 7, 4), Piece(104, 20, 6)])
        assert own[7:11] == b"0123"
        assert own[20:26] == b"456789"
        memory[100:104] = b"new!"
        await (await sources.open(inference_pb2.TRANSPORT_SHM, accepted(offer))).read([Piece(100, 7, 4)])
        assert own[7:11] == b"new!"
        with pytest.raises(TransportFailed, match="did not lend"):
            await source.read([Piece(SIZE - 2, 0, 4)])
        with pytest.raises(TypeError):  # for reading only
            source._pool.memory[0] = 1
        sources.close()


async def test_the_socket_and_its_directory_are_private(directory: Path) -> None:
    async with lender(directory) as (offer, _):
        assert mode(directory) == 0o700
        assert mode(directory / offer.name) == 0o600
    assert names(directory) == set()
    os.chmod(directory, 0o755)
    with pytest.raises(TransportFailed, match="open to others"):
        async with lender(directory):
            pass


async def test_who_does_not_know_the_token_gets_nothing(directory: Path) -> None:
    async with lender(directory) as (offer, _):
        wrong = prefill_pb2.SharedMemory(name=offer.name, token=bytes(32))
        with pytest.raises(TransportFailed, match="did not lend"):
            await shm.borrow(directory, wrong)
        pool = await shm.borrow(directory, offer)
        assert len(pool.memory) == SIZE
        pool.close()


@pytest.mark.parametrize(
    ("name", "token"),
    [("../etc/passwd", bytes(32)), ("kv-" + "0" * 32, b"short"), ("", b""), ("kv-" + "0" * 31 + "/", bytes(32))],
)
async def test_an_offer_that_is_none(directory: Path, name: str, token: bytes) -> None:
    with pytest.raises(TransportFailed, match="is none"):
        await shm.borrow(directory, prefill_pb2.SharedMemory(name=name, token=token))


async def test_another_host_is_told_apart(directory: Path, tmp_path: Path) -> None:
    """Where the directory is not the same one, the socket is not there; errors do not name it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    async with lender(directory) as (offer, _):
        sources = Sources(memoryview(bytearray(1)), elsewhere)
        for _ in range(2):  # the second time from memory
            with pytest.raises(TransportFailed) as failed:
                await sources.open(inference_pb2.TRANSPORT_SHM, accepted(offer))
            assert offer.name not in str(failed.value)
            assert str(elsewhere) not in str(failed.value)


_LENDER = """
import asyncio, os, sys
from pathlib import Path
from baton.handoff import shm
from baton.handoff.leases import LeaseTable

async def main():
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    async with shm.lending(Path(sys.argv[1]), fd, LeaseTable()) as offer:
        print(offer.SerializeToString().hex(), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_killed_lender_leaves_nothing(directory: Path) -> None:
    lending = subprocess.Popen([sys.executable, "-c", _LENDER, str(directory)], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert lending.stdout is not None
        offer = prefill_pb2.SharedMemory.FromString(bytes.fromhex(await asyncio.to_thread(lending.stdout.readline)))
        sources = Sources(memoryview(bytearray(1)), directory)
        source = await sources.open(inference_pb2.TRANSPORT_SHM, accepted(offer))
        await source.read([Piece(0, 0, 1)])
        assert _mapped("memfd:test") == 1
        lending.send_signal(signal.SIGKILL)
        await asyncio.to_thread(lending.wait)
        deadline = time.monotonic() + 10
        while _mapped("memfd:test"):  # the connection breaks, and the memory goes with it
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        with pytest.raises(TransportFailed):
            await source.read([Piece(0, 0, 1)])
        with pytest.raises(TransportFailed):
            await sources.open(inference_pb2.TRANSPORT_SHM, accepted(offer))
        assert names(directory) == {offer.name}
        async with lender(directory) as (successor, _):
            assert names(directory) == {successor.name}
            async with lender(directory) as (second, _):  # the living are not swept
                assert names(directory) == {successor.name, second.name}
    finally:
        lending.kill()


def _mapped(name: str) -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum(name in line for line in maps)


async def test_a_silent_caller_does_not_hold_the_door(directory: Path) -> None:
    async with lender(directory) as (offer, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.connect(str(directory / offer.name))
            pool = await shm.borrow(directory, offer)
            pool.close()
            silent.settimeout(10)
            assert await asyncio.to_thread(silent.recv, 1) == b"", "and is shown out"


async def test_a_lender_that_does_not_answer_costs_its_borrowers_one_wait_together(directory: Path) -> None:
    async with lender(directory) as (alive, _):
        frozen = prefill_pb2.SharedMemory(name="kv-" + "0" * 32, token=bytes(32))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            door.bind(str(directory / frozen.name))
            door.listen(16)
            sources = Sources(memoryview(bytearray(10)), directory)
            started = time.monotonic()
            waiting = [
                asyncio.create_task(sources.open(inference_pb2.TRANSPORT_SHM, accepted(frozen))) for _ in range(5)
            ]
            await asyncio.sleep(0.1)
            await sources.open(inference_pb2.TRANSPORT_SHM, accepted(alive))
            assert not any(task.done() for task in waiting), "nobody else waits for it"
            waiting[0].cancel()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(ends[0], asyncio.CancelledError)
            assert all(isinstance(end, TransportFailed) for end in ends[1:])
            assert time.monotonic() - started < 3
            sources.close()


async def test_a_directory_that_cannot_be_used_is_a_transport_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(TransportFailed, match="cannot lend memory"):
        async with lender(path):
            pass
