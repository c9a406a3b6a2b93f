"""A TCP proxy that makes a link slow: a delay per direction, a bandwidth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

_PIECE = 16 * 1024  # bytes read at once
_IN_FLIGHT = 256  # pieces on their way per direction; beyond it the sender is held back, as by a full pipe


@dataclass(slots=True)
class Fault:
    """What is wrong with one direction of a link. May change while connections are open."""

    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0
    """0: no limit."""

    def clear(self) -> None:
        """Nothing."""
        self.delay_seconds = self.bytes_per_second = 0.0


class Proxy:
    """Relays connections to one peer.

    Attributes:
        address: host:port to connect to.
        forward: from who connects to the peer.
        backward: from the peer to who connects.
    """

    def __init__(self, connect: Connect) -> None:
        self.address = ""
        self.forward = Fault()
        self.backward = Fault()
        self._connect = connect
        self._closing = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def to(cls, connect: Connect) -> AsyncIterator[Proxy]:
        """A proxy on a free port of loopback, for the length of the block."""
        proxy = cls(connect)
        server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        proxy.address = f"{host}:{port}"
        try:
            yield proxy
        finally:
            server.close()
            proxy._closing.set()
            await server.wait_closed()

    def cut(self) -> None:
        """Break the connections there are; new ones are relayed as before."""
        self._closing.set()
        self._closing = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer_reader, peer_writer = await self._connect()
        except OSError:
            writer.close()
            return
        relays = [
            asyncio.create_task(_relay(reader, peer_writer, self.forward)),
            asyncio.create_task(_relay(peer_reader, writer, self.backward)),
        ]
        closing = asyncio.create_task(self._closing.wait())
        # One direction at its end is the other's as well: gRPC and Redis know no half-closed connections.
        await asyncio.wait([*relays, closing], return_when=asyncio.FIRST_COMPLETED)
        for task in (*relays, closing):
            task.cancel()
        await asyncio.gather(*relays, closing, return_exceptions=True)
        peer_writer.close()
        writer.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
    """Copy one direction. Delays do not add up: each piece arrives its delay after it was sent."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
    loop = asyncio.get_running_loop()

    async def read() -> None:
        while data := await reader.read(_PIECE):
            await pieces.put((loop.time() + fault.delay_seconds, data))
        await pieces.put((loop.time() + fault.delay_seconds, b""))

    async def write() -> None:
        while True:
            due, data = await pieces.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                return
            if fault.bytes_per_second:
                await asyncio.sleep(len(data) / fault.bytes_per_second)
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as group:
        group.create_task(read())
        group.create_task(write())
