"""Listening for changes ends when it is told to, however its connections end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from baton_cache.local import LocalTier
from baton_cache.tracking import Tracking


class Connection:
    """Tells of nothing until it is lost."""

    def __init__(self, *, fails_to_close: bool) -> None:
        self.lost = asyncio.Event()
        self._fails_to_close = fails_to_close

    async def connect(self) -> None: ...

    async def send_command(self, *words: str) -> None: ...

    async def disconnect(self, *, nowait: bool) -> None:
        if self._fails_to_close:
            raise ConnectionResetError

    def _get_parser(self) -> Any:
        return SimpleNamespace(set_invalidation_push_handler=lambda handler: None)

    async def read_response(self, **how: Any) -> object:
        if not how:
            return b"OK"
        await self.lost.wait()
        raise ConnectionResetError


class Servers:
    """One server, whose connections are kept in `made`."""

    def __init__(self, *, first_fails_to_close: bool = False) -> None:
        self.made: list[Connection] = []
        self.options = self
        self._first_fails_to_close = first_fails_to_close

    def all(self) -> list[Any]:
        return [SimpleNamespace(address="here")]

    def connection(self, address: object) -> Connection:
        self.made.append(Connection(fails_to_close=self._first_fails_to_close and not self.made))
        return self.made[-1]


async def is_on(local: LocalTier) -> None:
    while not local.on:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_it_ends_though_a_connection_fails_to_close() -> None:
    """In Python 3.11 what fails in a task group wins over the cancellation of who waits for it."""
    local, servers = LocalTier(1024, 10), Servers(first_fails_to_close=True)
    async with asyncio.timeout(10):
        async with Tracking(cast("Any", servers), "p", local, 1.0).running():
            await is_on(local)
    assert not local.on
    assert len(servers.made) == 1


async def test_it_goes_on_after_every_lost_connection() -> None:
    local, servers = LocalTier(1024, 10), Servers()
    async with asyncio.timeout(10):
        async with Tracking(cast("Any", servers), "p", local, 1.0).running():
            for _ in range(3):
                await is_on(local)
                servers.made[-1].lost.set()
                while local.on:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await is_on(local)
    assert len(servers.made) == 4
