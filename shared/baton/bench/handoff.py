"""How fast KV moves between two processes of this host, beside what the machine can do.

Two processes, one pool each, no model: all KV is ready when the call begins, so that nothing hides. Every way moves the
same bytes; a round runs all of them, one after the other, so that ratios are of neighbours. The limits: a copy in this
process, a TCP connection on loopback, a gRPC stream of bytes that nobody looks at, a gRPC call without any.

A handoff is timed from the beginning of its call until the KV may be used, and so is a stream until its last byte. What
gRPC needs after that to end the call, a running request does not wait for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import mmap
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from baton.bench.handoff_shape import BYTES_METHOD, EMPTY_METHOD, LATE, Shape
from baton.handoff import nixl
from baton.handoff.cost import Handoff
from baton.handoff.encoding import deserialize
from baton.handoff.receiver import KvReceiver
from baton.handoff.reception import Reception
from baton.handoff.sources import Sources
from baton.handoff.transport import FASTEST_FIRST, Transport, TransportFailed, name
from baton.handoff.wire import CHUNK_BYTES, Chunk
from baton.internal.v1 import kv_pb2, prefill_pb2
from baton.rpc.channel import MESH_CHANNEL_OPTIONS
from baton.v1 import inference_pb2

LIMITS = {
    "shm": "memcpy",
    "shm, cold": "memcpy, cold",
    "shm, after the prompt": "memcpy",
    "nixl": "memcpy",
    "nixl, after the prompt": "memcpy",
    "call": "grpcio call",
    "grpc": "grpcio stream",
    "grpc, after the prompt": "grpcio stream",
}
"""The limit that each way is measured against."""
EMPTY = "call"
"""A handoff of one token's KV: what the call itself takes, most of which a prompt's computation hides."""
AFTER = ", after the prompt"
"""Timed from the instant at which all KV is ready, in a call that began before: what a computation does not hide."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to move the bytes.

    Attributes:
        name: "memcpy", "tcp", "grpcio stream", or a transport's.
        seconds: of each round.
        limit: name of the way that bounds this one; empty: it is one itself.
        ratios: of the limit's time to this one's, round by round: 1 is as fast as can be.
        moving_ratios: the same without the time of an empty call.
    """

    name: str
    seconds: list[float]
    limit: str = ""
    ratios: list[float] = field(default_factory=list)
    moving_ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class HandoffBench:
    """Results.

    Attributes:
        shape: what was moved.
        bytes: of it.
        first_contact: seconds of the first handoff between the two processes, by transport: connection included.
        ways: limits, then transports.
    """

    shape: Shape
    bytes: int
    first_contact: dict[str, float]
    ways: list[Way]

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """A table with one row for each way; medians."""
        lines = ["| way | ms | GB/s | of its limit | without the call |", "|---|---|---|---|---|"]
        for way in self.ways:
            seconds = statistics.median(way.seconds)
            share = f"{statistics.median(way.ratios):.0%} of {way.limit}" if way.ratios else ""
            moving = f"{statistics.median(way.moving_ratios):.0%}" if way.moving_ratios else ""
            speed = "" if "call" in way.name else f"{self.bytes / seconds / 1e9:.2f}"
            lines.append(f"| {way.name} | {seconds * 1e3:.2f} | {speed} | {share} | {moving} |")
        lines += ["", "| first contact | ms |", "|---|---|"]
        lines += [f"| {transport} | {seconds * 1e3:.1f} |" for transport, seconds in self.first_contact.items()]
        return "\n".join(lines) + "\n"


class Bench:
    """This process: it receives.

    Args:
        shape: what moves.
        address: of the other process's gRPC server.
        tcp_port: of its raw TCP.
        directory: where shared memory is lent.
        credit_bytes: KV bytes in flight over gRPC.
    """

    def __init__(self, shape: Shape, address: str, tcp_port: int, directory: Path, credit_bytes: int) -> None:
        self.shape = shape
        self.address = address
        self._tcp_port = tcp_port
        self._directory = directory
        self._credit = credit_bytes
        self._layout = shape.layout()
        self._mapped = mmap.mmap(-1, self._layout.total_bytes)
        self.memory = memoryview(self._mapped)
        self._other = memoryview(mmap.mmap(-1, self._layout.total_bytes))
        self._other[:] = b"\1" * self._layout.total_bytes
        try:
            self._reader: nixl.Reader | None = nixl.Reader(self.memory)
        except TransportFailed:
            self._reader = None
        self.sources = Sources(self.memory, directory, self._reader)
        self._lent = ""  # name of the other's pool, once it was read

    @property
    def transports(self) -> list[Transport]:
        """Those to be had here."""
        return [t for t in FASTEST_FIRST if t != inference_pb2.TRANSPORT_NIXL or self._reader is not None]

    def forget(self) -> None:
        """The own pool's memory goes back to the system: what is written next is written for the first time."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    async def memcpy(self) -> float:
        """Seconds to copy as many bytes, in this process, in the pieces a transport copies."""
        started = time.perf_counter()
        size = 1 << 20
        for at in range(0, self.shape.bytes, size):
            self.memory[at : at + size] = self._other[at : at + size]
        return time.perf_counter() - started

    async def tcp(self) -> float:
        """Seconds to receive the bytes over a TCP connection on loopback, into the pool."""
        return await asyncio.to_thread(self._tcp)

    def _tcp(self) -> float:
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self._tcp_port)) as connection:
            at = 0
            while at < self.shape.bytes:
                at += connection.recv_into(self.memory[at : min(at + (1 << 20), self.shape.bytes)])
            return time.perf_counter() - started

    async def stream(self, channel: grpc.aio.Channel) -> float:
        """Seconds to receive the bytes in a gRPC stream, in messages as long as a chunk; nobody looks at them."""
        size = min(CHUNK_BYTES, self.shape.bytes)
        left = self.shape.bytes
        started = ended = time.perf_counter()
        async for message in channel.unary_stream(BYTES_METHOD, None, None)(size.to_bytes(8, "little")):
            left -= len(message)
            ended = time.perf_counter()
        return ended - started

    async def empty(self, channel: grpc.aio.Channel) -> float:
        """Seconds of a call in which each side says a word, and then the last one: no handoff can be shorter."""
        started = ended = time.perf_counter()
        answered = asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            yield b"start"
            await answered.wait()

        async for _ in channel.stream_stream(EMPTY_METHOD, None, None)(requests()):
            answered.set()
            ended = time.perf_counter()
        return ended - started

    async def handoff(
        self, channel: grpc.aio.Channel, transport: Transport, start_token: int = 0, *, late: bool = False
    ) -> tuple[Handoff, float]:
        """One handoff: what it cost, and seconds from the beginning of its call until the KV may be used.

        Args:
            channel: to the other process.
            transport: the only one.
            start_token: tokens before it do not move.
            late: the KV becomes ready a while after the call began, and seconds count from then.
        """
        shape = self.shape
        started_ns = time.monotonic_ns()
        codecs = (kv_pb2.KV_CODEC_RAW,)
        receiver = KvReceiver(self._layout, self.memory, 0, start_token, shape.tokens, self._credit, codecs)
        cost = Handoff()
        reception = Reception(receiver, self.sources, (transport,), cost)
        start = prefill_pb2.Start(
            request_id=LATE if late else "",
            credit_bytes=self._credit,
            codecs=codecs,
            transports=(transport,),
            start_token=start_token,
            mapped_memory=self._lent if transport == inference_pb2.TRANSPORT_SHM else "",
        )
        call = channel.stream_stream(
            "/baton.internal.v1.Prefill/Prefill",
            request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
            response_deserializer=deserialize,
        )(reception.requests(start))
        usable_ns = 0
        async for message in call:
            if isinstance(message, Chunk):
                reception.chunk(message)
            elif message.HasField("ranges"):
                if await reception.ranges(message.ranges):
                    usable_ns = time.monotonic_ns()
            elif message.HasField("accepted"):
                await reception.accepted(message.accepted)
                self._lent = reception.memory or self._lent
            elif message.HasField("first_token") and late:
                started_ns = message.first_token.since_accepted_ns  # of our clock: see handoff_peer
            elif message.HasField("done"):
                receiver.verify(message.done)
                usable_ns = usable_ns or time.monotonic_ns()
        return cost, (usable_ns - started_ns) / 1e9


@asynccontextmanager
async def two_processes(shape: Shape, credit_bytes: int) -> AsyncIterator[Bench]:
    """This one, and one that sends."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        peer = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "baton.bench.handoff_peer",
            shape.to_json(),
            directory,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert peer.stdin is not None
            assert peer.stdout is not None
            while not (said := await peer.stdout.readline()).startswith(b"ready"):  # NIXL prints, too
                if not said:
                    raise RuntimeError("the other process of the benchmark ended")
            _, port, tcp_port = said.split()
            bench = Bench(shape, f"127.0.0.1:{int(port)}", int(tcp_port), Path(directory), credit_bytes)
            yield bench
            bench.sources.close()
            peer.stdin.close()
            await peer.wait()
        finally:
            if peer.returncode is None:
                peer.kill()
                await peer.wait()


async def run(shape: Shape, rounds: int = 15, credit_bytes: int = 8 << 20) -> HandoffBench:
    """Measure every way, `rounds` times, after one that does not count."""
    async with two_processes(shape, credit_bytes) as bench:
        contact: dict[str, float] = {}
        for transport in bench.transports:
            async with grpc.aio.insecure_channel(bench.address, options=MESH_CHANNEL_OPTIONS) as channel:
                _, contact[name(transport)] = await bench.handoff(channel, transport)
        async with grpc.aio.insecure_channel(bench.address, options=MESH_CHANNEL_OPTIONS) as channel:

            async def handoff(transport: Transport, start_token: int = 0, *, late: bool = False) -> float:
                return (await bench.handoff(channel, transport, start_token, late=late))[1]

            ways: dict[str, Callable[[], Awaitable[float]]] = {
                "memcpy, cold": bench.memcpy,
                "shm, cold": lambda: handoff(inference_pb2.TRANSPORT_SHM),
                "memcpy": bench.memcpy,
            }
            for transport in (t for t in bench.transports if t != inference_pb2.TRANSPORT_GRPC):
                ways[name(transport)] = lambda t=transport: handoff(t)  # type: ignore[misc]
                ways[name(transport) + AFTER] = lambda t=transport: handoff(t, late=True)  # type: ignore[misc]
            ways["grpcio call"] = lambda: bench.empty(channel)
            ways[EMPTY] = lambda: handoff(inference_pb2.TRANSPORT_SHM, shape.tokens - 1)
            ways["tcp"] = bench.tcp
            ways["grpcio stream"] = lambda: bench.stream(channel)
            ways["grpc"] = lambda: handoff(inference_pb2.TRANSPORT_GRPC)
            ways["grpc" + AFTER] = lambda: handoff(inference_pb2.TRANSPORT_GRPC, late=True)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(rounds + 1):
                for way, move in ways.items():
                    if "cold" in way:
                        bench.forget()
                    took = await move()
                    if turn:
                        seconds[way].append(took)
    return HandoffBench(shape, shape.bytes, contact, [_way(way, seconds) for way in ways])


def _way(way: str, seconds: dict[str, list[float]]) -> Way:
    limit = LIMITS.get(way, "")
    if not limit:
        return Way(way, seconds[way])
    rounds = list(zip(seconds[limit], seconds[way], seconds[EMPTY], strict=True))
    ratios = [best / own for best, own, _ in rounds]
    if way == EMPTY or AFTER in way:
        return Way(way, seconds[way], limit, ratios)
    # A round in which the empty call took as long as the full one says nothing of the bytes.
    moving = [best / (own - empty) for best, own, empty in rounds if own > empty]
    return Way(way, seconds[way], limit, ratios, moving)
