"""How a service comes to have an engine, and what it watches of it when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from baton.engine.client import EngineClient
from baton.engine.errors import EngineError
from baton.rpc.service import CannotStart, Runtime
from baton.worker.engine import running_engine
from baton.worker.settings import WorkerSettings
from baton.worker.step_meter import StepMeter


class Engine:
    """What `running_engine` calls, and a note of each call."""

    exact = True
    epitaph = ""

    def __init__(self) -> None:
        self.on_report: list[Any] = []
        self.calls: list[str] = []

    async def wait_dead(self) -> None:
        await self._until_cancelled("wait_dead")

    async def check_alive(self, silence: float, tell: object) -> None:
        await self._until_cancelled("check_alive")

    async def close(self) -> None:
        self.calls.append("closed")

    async def _until_cancelled(self, name: str) -> None:
        self.calls.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            self.calls.append(f"{name} ended")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = Engine()

    async def start(*_: object, **__: object) -> Engine:
        return engine

    monkeypatch.setattr(EngineClient, "start", start)
    yield engine
    assert engine.calls[-1] == "closed"


async def test_silence_is_watched_from_after_the_warm_up_to_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest step is not known before: a slow engine would be killed for its first long one."""

    async def warm_up(*_: object) -> None:
        await asyncio.sleep(0.01)  # other tasks run
        engine.calls.append("warm")

    monkeypatch.setattr("baton.worker.engine.warm_up", warm_up)
    runtime = Runtime("decode", grpc.aio.server())
    async with running_engine(WorkerSettings(), runtime, StepMeter(256)):
        await asyncio.sleep(0.01)
        assert engine.calls == ["wait_dead", "warm", "check_alive"]
    assert set(engine.calls[3:-1]) == {"wait_dead ended", "check_alive ended"}


async def test_a_failed_warm_up_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def warm_up(*_: object) -> None:
        await asyncio.sleep(0.01)
        raise EngineError("the warm-up failed: no answer")

    monkeypatch.setattr("baton.worker.engine.warm_up", warm_up)
    with pytest.raises(CannotStart, match="no answer"):
        async with running_engine(WorkerSettings(), Runtime("decode", grpc.aio.server()), StepMeter(256)):
            pass
    assert engine.calls == ["wait_dead", "wait_dead ended", "closed"]
