"""How long a worker's state stream goes on. Without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton.internal.v1 import worker_pb2
from baton.rpc.drain import Drain
from baton.worker.calls import Calls
from baton.worker.servicer import WorkerServicer


class Watched(WorkerServicer):
    """Says only whether it drains."""

    def __init__(self, drain: Drain, calls: Calls) -> None:
        unused: Any = None
        engine: Any = SimpleNamespace(on_report=[])
        runtime: Any = SimpleNamespace(draining=drain.begun)
        super().__init__(worker_pb2.WORKER_ROLE_DECODE, unused, engine, unused, calls, runtime)
        self._drain = drain

    def state(self) -> worker_pb2.WatchResponse:
        return worker_pb2.WatchResponse(draining=self._drain.begun.is_set())

    async def watched(self, states: list[bool]) -> None:
        async with self._drain.serving("/baton.internal.v1.Worker/Watch"):
            request = worker_pb2.WatchRequest(interval_ms=50)
            async for state in cast("AsyncIterator[worker_pb2.WatchResponse]", self.Watch(request, cast("Any", None))):
                states.append(state.draining)


@pytest.mark.parametrize("finishes", [True, False])
async def test_a_draining_worker_is_watched_while_calls_run_and_no_longer(finishes: bool) -> None:
    drain, calls, states = Drain(), Calls(), list[bool]()
    over = asyncio.Event()

    async def call() -> None:
        async with drain.serving("/baton.internal.v1.Decode/Generate"):
            with calls.track("1"):
                await over.wait()

    running = asyncio.create_task(call())
    watching = asyncio.create_task(Watched(drain, calls).watched(states))
    async with asyncio.timeout(20):
        while not states:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        drain.begun.set()
        while states.count(True) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not watching.done()
        if finishes:
            over.set()
            await drain.finish(3600, 0.0)
        else:
            await drain.finish(0.1, 0.0)
        ends = await asyncio.gather(running, watching, return_exceptions=True)
    assert [type(end).__name__ for end in ends] == (["NoneType"] * 2 if finishes else ["Unavailable"] * 2)
    assert drain.calls == 0
