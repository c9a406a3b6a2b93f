"""A suspect in the decode tier: it waits for its turn, and answers only for an engine that had begun with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton.engine.handle import EngineDied, RequestHandle
from baton.engine.messages import Command, ComputeHere, Reserved, Submit
from baton.internal.v1 import decode_pb2
from baton.rpc.errors import PoisonRequest, Unavailable
from baton.worker.calls import Calls
from baton.worker.trials import Trials
from baton_decode.decode import DecodeServicer
from baton_decode.placement import HERE, Prompt
from baton_decode.placer import Decision
from baton_decode.run import Run
from baton_decode.spacing import Spacing
from tests.decode.test_streaming import TOKENIZERS, a_request


class Engine:
    """Reserves at once; dies when told to, or when it is asked to compute."""

    def __init__(self, *, dies_of_it: bool = False) -> None:
        self.spec = SimpleNamespace(fingerprint="f")
        self.dead = False
        self.epitaph = "it is gone"
        self._dies_of_it = dies_of_it

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[RequestHandle]:
        handle = RequestHandle(self, submit.request_id)
        handle.push(Reserved(submit.request_id, slot=0, cached_tokens=0, queue_ns=0))
        yield handle

    def send(self, command: Command) -> None:
        assert isinstance(command, ComputeHere)
        if self.dead:
            raise EngineDied(self.epitaph)
        self.dead = self._dies_of_it


class Placer:
    """Everything is computed here."""

    def decide(self, prompt: Prompt, candidates: object) -> Decision:
        return Decision(HERE, "scripted", prompt, 0.0, None, 0.0)

    def computing_here(self, decision: Decision) -> None: ...

    def ended_here(self, decision: Decision, first_token: float) -> None: ...


def a_servicer(engine: Engine, trials: Trials) -> DecodeServicer:
    runtime = SimpleNamespace(draining=asyncio.Event())
    parts: list[Any] = [engine, TOKENIZERS[0], None, Placer(), Spacing(1e9), trials, Calls(), runtime]
    return DecodeServicer(*parts)


def a_suspect(name: str) -> decode_pb2.GenerateRequest:
    request = a_request(TOKENIZERS[0])
    request.request_id, request.model_fingerprint, request.suspect = name, "f", True
    return request


async def answered(servicer: DecodeServicer, name: str) -> None:
    context = cast("Any", SimpleNamespace(time_remaining=lambda: None))
    async with aclosing(servicer.Generate(a_suspect(name), context)) as messages:
        async for _ in messages:
            pass


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_it_is_guilty_of_the_engine_that_dies_of_it() -> None:
    with pytest.raises(PoisonRequest):
        await answered(a_servicer(Engine(dies_of_it=True), Trials(60)), "r")


async def test_whose_turn_comes_on_a_dead_engine_was_never_computed() -> None:
    engine, trials = Engine(), Trials(60)
    servicer = a_servicer(engine, trials)
    with trials.suspect(0) as on:
        waiting = asyncio.create_task(answered(servicer, "r"))
        await until(lambda: len(trials._waiting) == 1)
        assert on.turn.is_set()
        engine.dead = True
    with pytest.raises(Unavailable, match="it is gone"):
        await waiting


@pytest.mark.parametrize("turns", range(4))
async def test_a_cancel_that_comes_with_its_turn_is_not_lost(turns: int) -> None:
    trials = Trials(60)
    servicer = a_servicer(Engine(), trials)
    run = Run(TOKENIZERS[0], a_suspect("r"))
    on, its = ExitStack(), ExitStack()
    with on, its:
        on.enter_context(trials.suspect(0))

        async def wait() -> None:
            async with aclosing(servicer._await_turn(run, its)) as messages:
                async for _ in messages:
                    pass

        waiting = asyncio.create_task(wait())
        await until(lambda: run.trial is not None)
        await asyncio.sleep(0.01)
        on.close()
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
