"""The proxy does to a link what it is told, to that link only, and stops when told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.verify.proxy import Proxy


@asynccontextmanager
async def an_echo() -> AsyncIterator[tuple[str, int]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2]
    finally:
        server.close()


@asynccontextmanager
async def a_link(who: str = "") -> AsyncIterator[tuple[Proxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    async def name(port: int) -> str:
        return who

    async with (
        an_echo() as (host, port),
        Proxy.to(lambda: asyncio.open_connection(host, port), name if who else None) as proxy,
    ):
        host, _, number = proxy.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        try:
            yield proxy, reader, writer
        finally:
            writer.close()


async def test_passes_everything_on() -> None:
    async with a_link() as (_, reader, writer):
        writer.write(b"baton" * 20000)
        assert await reader.readexactly(100000) == b"baton" * 20000


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_delays_each_direction(direction: str) -> None:
    async with a_link() as (proxy, reader, writer):
        fault = getattr(proxy, direction)
        fault.delay_seconds = 0.2
        started = time.monotonic()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_a_black_hole_keeps_everything_until_it_is_gone(direction: str) -> None:
    async with a_link() as (proxy, reader, writer):
        fault = getattr(proxy, direction)
        fault.black_hole = True
        writer.write(b"first")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        fault.clear()
        assert await reader.readexactly(5) == b"first"


async def test_a_black_hole_is_as_deaf_to_the_end_of_a_connection() -> None:
    async with a_link() as (proxy, reader, writer):
        proxy.forward.black_hole = True
        writer.write_eof()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        proxy.forward.clear()
        assert await asyncio.wait_for(reader.read(1), 5) == b""


async def test_cutting_resets_what_is_open_and_nothing_else() -> None:
    async with a_link() as (proxy, reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        host, _, number = proxy.address.rpartition(":")
        again, other = await asyncio.open_connection(host, int(number))
        other.write(b"y")
        assert await again.readexactly(1) == b"y"
        other.close()


async def test_flips_one_byte_of_so_many_large_pieces() -> None:
    sent = b"\0" * 8192
    async with a_link() as (proxy, reader, writer):
        fault = proxy.backward
        fault.flips = 2
        writer.write(b"small")
        assert await reader.readexactly(5) == b"small"
        for _ in range(3):
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(0.05)
        got = await reader.readexactly(3 * len(sent))
        assert (fault.flips, fault.flipped) == (0, 2)
        assert sum(byte.bit_count() for byte in got) == 2


async def test_whoever_connects_has_a_link_of_their_own() -> None:
    async with a_link("decode-0") as (proxy, reader, writer):
        proxy.link("decode-1").backward.black_hole = True
        writer.write(b"x")
        assert await asyncio.wait_for(reader.readexactly(1), 5) == b"x"
        proxy.link("decode-0").backward.black_hole = True
        writer.write(b"y")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
