"""A TCP proxy that makes links bad: slow, narrow, deaf, cut, or corrupt; per direction, and per who connects."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Who = Callable[[int], Awaitable[str]]
"""The name of whoever connects from a local port."""

_PIECE = 16 * 1024  # bytes read at once
_IN_FLIGHT = 256  # pieces on their way per direction; beyond it the sender is held back, as by a full pipe
_BLACK = 0.02  # seconds between two looks at whether a black hole is gone
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing throws away what is unsent, and tells the peer so


@dataclass(slots=True)
class Fault:
    """What is wrong with one direction of a link. May change while connections are open.

    Attributes:
        delay_seconds: each piece comes so much later.
        jitter_seconds: and up to so much more, in order.
        bytes_per_second: 0: no limit.
        black_hole: nothing comes. What was sent meanwhile comes when that ends, as TCP would send it again.
        flips: so many of the next large pieces get one flipped byte each.
        flip_at_least: bytes that make a piece large; small ones are the headers of HTTP/2, whose damage cuts the link.
        flipped: how many were.
    """

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    bytes_per_second: float = 0.0
    black_hole: bool = False
    flips: int = 0
    flip_at_least: int = 4096
    flipped: int = 0

    def clear(self) -> None:
        """Nothing."""
        self.delay_seconds = self.jitter_seconds = self.bytes_per_second = 0.0
        self.black_hole = False
        self.flips = 0

    def damaged(self, data: bytes) -> bytes:
        """A piece as it arrives."""
        if not self.flips or len(data) < self.flip_at_least:
            return data
        self.flips -= 1
        self.flipped += 1
        # In the second half: the frame's own header lies at the start of a piece, if it lies in it.
        at = random.randrange(len(data) // 2, len(data))
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


@dataclass(slots=True)
class Link:
    """Both directions between one that connects and the peer.

    Attributes:
        forward: from who connects to the peer.
        backward: from the peer to who connects.
    """

    forward: Fault = field(default_factory=Fault)
    backward: Fault = field(default_factory=Fault)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    def cut(self) -> None:
        """Break the connections there are; new ones are relayed as before."""
        self._closing.set()
        self._closing = asyncio.Event()

    def clear(self) -> None:
        """Nothing is wrong any more."""
        self.forward.clear()
        self.backward.clear()


class Proxy:
    """Relays connections to one peer.

    Args:
        connect: how to reach the peer.
        who: tells those who connect apart; unset: they all share one link.

    Attributes:
        address: host:port to connect to.
        links: by who connects.
    """

    def __init__(self, connect: Connect, who: Who | None = None) -> None:
        self.address = ""
        self.links: dict[str, Link] = {}
        self._connect = connect
        self._who = who
        self._closing = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def to(cls, connect: Connect, who: Who | None = None) -> AsyncIterator[Proxy]:
        """A proxy on a free port of loopback, for the length of the block."""
        proxy = cls(connect, who)
        server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        proxy.address = f"{host}:{port}"
        try:
            yield proxy
        finally:
            server.close()
            proxy._closing.set()
            await server.wait_closed()

    @property
    def forward(self) -> Fault:
        """From who connects to the peer, where they all share a link."""
        return self.link().forward

    @property
    def backward(self) -> Fault:
        """From the peer to who connects, where they all share a link."""
        return self.link().backward

    def link(self, who: str = "") -> Link:
        """The link of one that connects."""
        return self.links.setdefault(who, Link())

    def cut(self) -> None:
        """Break the connections there are, of everybody; new ones are relayed as before."""
        for link in self.links.values():
            link.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = self.link(await self._who(writer.get_extra_info("peername")[1]) if self._who else "")
        try:
            peer_reader, peer_writer = await self._connect()
        except OSError:
            writer.close()
            return
        relays = [
            asyncio.create_task(_relay(reader, peer_writer, link.forward)),
            asyncio.create_task(_relay(peer_reader, writer, link.backward)),
        ]
        cut = asyncio.create_task(link._closing.wait())
        closing = asyncio.create_task(self._closing.wait())
        # One direction at its end is the other's as well: gRPC and Redis know no half-closed connections.
        await asyncio.wait([*relays, cut, closing], return_when=asyncio.FIRST_COMPLETED)
        reset = cut.done()
        for task in (*relays, cut, closing):
            task.cancel()
        await asyncio.gather(*relays, cut, closing, return_exceptions=True)
        for each in (peer_writer, writer):
            _end(each, reset=reset)


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    connection = writer.get_extra_info("socket")
    if reset and connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
    else:
        writer.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    """Copy one direction. Delays do not add up: each piece arrives its delay after it was sent."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
    loop = asyncio.get_running_loop()

    def due() -> float:
        return loop.time() + fault.delay_seconds + random.random() * fault.jitter_seconds

    async def read() -> None:
        while data := await reader.read(_PIECE):
            await pieces.put((due(), data))
        await pieces.put((due(), b""))

    async def write() -> None:
        while True:
            when, data = await pieces.get()
            if (wait := when - loop.time()) > 0:
                await asyncio.sleep(wait)
            while fault.black_hole:  # noqa: ASYNC110 a field that anybody may set
                await asyncio.sleep(_BLACK)
            if not data:
                return
            if fault.bytes_per_second:
                await asyncio.sleep(len(data) / fault.bytes_per_second)
            writer.write(fault.damaged(data))
            await writer.drain()

    async with asyncio.TaskGroup() as group:
        group.create_task(read())
        group.create_task(write())
