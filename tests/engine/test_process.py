"""An engine in its own process: it serves, it fails loudly, and neither side outlives what it lives for."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from baton.engine.client import EngineClient, EngineDied, RequestHandle
from baton.engine.config import EngineConfig
from baton.engine.errors import EngineError
from baton.engine.loader import LoadedModel
from baton.engine.messages import Failed, FailureReason, KvReady, Output, Progress, Reserved, Role, StepReport
from tests.engine.conftest import Stepped, a_prompt, a_submit
from tests.fixtures import zygote

LONG = 400
"""Tokens of an answer that is still under way when something happens to it."""


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", autouse=True)
def own_engines() -> Iterator[None]:
    """How an engine process starts and ends is what is tested here."""
    with zygote.own_engines():
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(llama: Path, own_engines: None) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(EngineConfig(model=llama, num_slots=4, step_tokens=32))
    yield client
    await client.close()


@pytest_asyncio.fixture(loop_scope="module")
async def client(shared_client: EngineClient) -> AsyncIterator[EngineClient]:
    """A running engine, for tests that leave it as they found it."""
    yield shared_client
    await check_quiet(shared_client)


@pytest_asyncio.fixture(loop_scope="module")
async def mortal(llama: Path) -> AsyncIterator[EngineClient]:
    """An engine to kill."""
    client = await EngineClient.start(EngineConfig(model=llama, num_slots=4, step_tokens=32))
    yield client
    await client.close()


async def to_the_end(handle: RequestHandle) -> list[int]:
    tokens: list[int] = []
    while True:
        event = await handle.next(30)
        if isinstance(event, Progress):
            continue
        assert isinstance(event, Output), event
        tokens += event.token_ids
        if event.finish_reason is not None:
            return tokens


async def check_quiet(client: EngineClient) -> None:
    state = await client.inspect()
    assert (state.requests, state.free_slots, state.used_tokens) == ([], state.total_slots, 0)


def process_of(client: EngineClient) -> psutil.Process:
    return psutil.Process(client._process.pid)


async def until_gone(process: psutil.Process, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 nobody tells
            await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------------- serving


async def test_tokens_are_read_together_or_one_by_one(client: EngineClient) -> None:
    async with client.request(a_submit("alone", a_prompt(20), max_tokens=40)) as handle:
        expected = await to_the_end(handle)
    tokens: list[int] = []
    reads = 0
    async with client.request(a_submit("together", a_prompt(20), max_tokens=40)) as handle:
        last: Output | None = None
        while last is None or last.finish_reason is None:
            events = await handle.next_all(30, gather=1.0 if tokens else 0.0)
            reads += 1
            for event in events:
                if isinstance(event, Output):
                    assert event.index == len(tokens)
                    tokens += event.token_ids
                    last = event
    assert tokens == expected
    assert reads < 20, "a step does not take a second"


async def test_serves_what_the_engine_serves(client: EngineClient, loaded: LoadedModel) -> None:
    assert client.spec == loaded.spec
    submits = [a_submit("same id", a_prompt(20 + i, i), temperature=0.8, seed=i) for i in range(6)]
    expected = [Stepped(loaded).run(submit).tokens("same id") for submit in submits]

    async def ask(i: int) -> list[int]:
        async with client.request(submits[i]) as handle:
            return await to_the_end(handle)

    assert await asyncio.gather(*map(ask, range(6))) == expected
    await check_quiet(client)


async def test_a_handoff_through_shared_memory(llama: Path, client: EngineClient, loaded: LoadedModel) -> None:
    """The front reads one engine's KV and writes it into another's, both mapped here."""
    prompt = a_prompt(50)
    expected = Stepped(loaded).run(a_submit("r", prompt, temperature=0.8, seed=4)).tokens("r")
    other = await EngineClient.start(EngineConfig(model=llama, num_slots=2, step_tokens=16))
    try:
        async with (
            other.request(a_submit("r", prompt, Role.PREFILL, temperature=0.8, seed=4)) as prefill,
            client.request(a_submit("r", prompt, Role.RECEIVE, temperature=0.8, seed=4)) as decode,
        ):
            reserved = await decode.next(30)
            assert isinstance(reserved, Reserved)
            while isinstance(event := await prefill.next(30), KvReady | Progress):
                if isinstance(event, Progress):
                    continue
                place = (event.layer, event.slot, event.start, event.stop)
                target = (event.layer, reserved.slot, event.start, event.stop)
                source = other.layout.rows(other.memory, *place)
                for to, what in zip(client.layout.rows(client.memory, *target), source, strict=True):
                    to[:] = what
            assert isinstance(event, Output)
            decode.commit(event.token_ids)
            assert [*event.token_ids, *await to_the_end(decode)] == expected
        await check_quiet(other)
        await check_quiet(client)
    finally:
        await other.close()


async def test_compute_here(client: EngineClient, loaded: LoadedModel) -> None:
    expected = Stepped(loaded).run(a_submit("r", a_prompt(30))).tokens("r")
    async with client.request(a_submit("r", a_prompt(30), Role.RECEIVE)) as handle:
        assert isinstance(await handle.next(30), Reserved)
        handle.compute_here()
        assert await to_the_end(handle) == expected


async def test_refusals_come_as_events(client: EngineClient) -> None:
    async with client.request(a_submit("r", [5] * 600)) as handle:
        event = await handle.next(30)
    assert isinstance(event, Failed)
    assert event.reason is FailureReason.INVALID
    await check_quiet(client)


async def test_reports_come_with_steps_and_once_when_idle(client: EngineClient) -> None:
    reports: list[StepReport] = []
    client.on_report.append(reports.append)
    async with client.request(a_submit("r", a_prompt(40, seed=40), max_tokens=5)) as handle:
        await to_the_end(handle)
    for _ in range(3):
        await client.inspect()
    assert [(r.prefill_tokens, r.decode_requests) for r in reports] == [(32, 0), (8, 0), *[(0, 1)] * 4, (0, 0)]
    assert (reports[-1].running, reports[-1].waiting, reports[-1].used_tokens) == (0, 0, 0)


@pytest.mark.parametrize("role", Role)
async def test_leaving_the_block_frees(client: EngineClient, role: Role) -> None:
    """In the middle of whatever the request was doing."""
    async with client.request(a_submit("r", a_prompt(100), role, max_tokens=LONG)) as handle:
        await handle.next(30)
        assert (await client.inspect()).free_slots == 3
    await check_quiet(client)


async def test_a_cancelled_task_frees(client: EngineClient) -> None:
    started = asyncio.Event()

    async def ask() -> None:
        async with client.request(a_submit("r", a_prompt(100), max_tokens=LONG)) as handle:
            await handle.next(30)
            started.set()
            await to_the_end(handle)

    task = asyncio.create_task(ask())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await check_quiet(client)


# ------------------------------------------------------------------------------------------- loading


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    children = set(psutil.Process().children())
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no config\.json"):
        await EngineClient.start(EngineConfig(model=tmp_path))
    assert time.monotonic() - began < 20
    assert set(psutil.Process().children()) <= children


async def test_no_memory_file_leaves_no_socket(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENFILE, "too many open files")

    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        with pytest.raises(OSError, match="too many open files") as failed:  # whose frames keep what was not closed
            await EngineClient.start(EngineConfig(model=llama))
    assert set(os.listdir("/proc/self/fd")) == before, failed


async def test_an_engine_that_takes_too_long_is_killed(llama: Path) -> None:
    children = set(psutil.Process().children())
    with pytest.raises(EngineError, match=r"not ready after 0\.05 s"):
        await EngineClient.start(EngineConfig(model=llama), timeout=0.05)
    assert set(psutil.Process().children()) <= children


async def test_an_engine_that_dies_while_loading_is_an_error(llama: Path) -> None:
    others = set(psutil.Process().children())

    def kill(stage: str, fraction: float) -> None:
        for child in set(psutil.Process().children()) - others:
            child.kill()

    with pytest.raises(EngineError, match="status -9 while loading"):
        await EngineClient.start(EngineConfig(model=llama), kill)


# --------------------------------------------------------------------------------------------- dying


async def test_everybody_learns_that_the_engine_died(mortal: EngineClient) -> None:
    handles: list[RequestHandle] = []
    ready = asyncio.Event()

    async def ask(i: int, role: Role) -> None:
        async with mortal.request(a_submit("r", a_prompt(30, i), role, max_tokens=LONG)) as handle:
            handles.append(handle)
            if len(handles) == 4:
                ready.set()
            while True:
                await handle.next(30)

    roles = (Role.GENERATE, Role.GENERATE, Role.PREFILL, Role.RECEIVE)
    tasks = [asyncio.create_task(ask(i, role)) for i, role in enumerate(roles)]
    await ready.wait()
    inspection = asyncio.create_task(mortal.inspect())
    await asyncio.sleep(0)
    os.kill(mortal._process.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*tasks, inspection, return_exceptions=True)
        await mortal.wait_dead()
    for result in results[:4]:
        assert isinstance(result, EngineDied)
        assert "status -9" in str(result)
    assert mortal.dead
    with pytest.raises(EngineDied, match="status -9"):
        await mortal.inspect()
    with pytest.raises(EngineDied):
        async with mortal.request(a_submit("r", a_prompt(5))):
            pass


async def test_a_frozen_engine_is_killed_on_close(llama: Path) -> None:
    stages: list[str] = []
    client = await EngineClient.start(EngineConfig(model=llama), lambda stage, fraction: stages.append(stage))
    assert (stages[0], stages[-1]) == ("weights", "self-test")
    process = process_of(client)
    process.suspend()
    await client.close(timeout=0.2)
    assert not process.is_running()
    assert client.dead


async def test_a_silent_engine_is_killed_and_everybody_learns(mortal: EngineClient) -> None:
    told: list[bool] = []

    async def tell(stalled: bool) -> None:
        assert mortal.stalled is stalled
        told.append(stalled)

    watching = asyncio.create_task(mortal.check_alive(0.5, tell, interval=0.05))
    async with (
        mortal.request(a_submit("r", a_prompt(30), Role.RECEIVE)) as waiting,
        mortal.request(a_submit("r", a_prompt(5), max_tokens=3)) as answered,
    ):
        assert isinstance(await waiting.next(30), Reserved)
        await asyncio.sleep(0.7)
        assert not mortal.dead
        process_of(mortal).suspend()
        with pytest.raises(EngineDied, match="said nothing"):
            await waiting.next(30)
        # What came before is still there to be read.
        assert len(await to_the_end(answered)) == 3
        with pytest.raises(EngineDied, match="said nothing"):
            await answered.next(30)
    await watching
    await mortal.wait_dead()
    assert told == [True], "nothing new should have come to it before it was given up"


async def test_an_engine_that_was_only_held_up_serves_again(mortal: EngineClient) -> None:
    told: asyncio.Queue[bool] = asyncio.Queue()
    watching = asyncio.create_task(mortal.check_alive(4, told.put, interval=0.05))
    await asyncio.sleep(0.2)
    process_of(mortal).suspend()
    try:
        assert await asyncio.wait_for(told.get(), 30)
    finally:
        process_of(mortal).resume()
    assert not await asyncio.wait_for(told.get(), 30)
    assert not mortal.stalled
    assert not mortal.dead
    watching.cancel()


async def test_close_leaves_nothing(llama: Path) -> None:
    """No process, no file descriptor, no mapping of the pool, also where a request was under way."""

    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return psutil.Process().num_fds(), maps.count("baton-kv")

    before = held()
    client = await EngineClient.start(EngineConfig(model=llama))
    process = process_of(client)
    assert held() > before
    async with client.request(a_submit("r", a_prompt(30), max_tokens=LONG)) as handle:
        await handle.next(30)
        await client.close()
        with pytest.raises(EngineDied, match="stopped"):
            await to_the_end(handle)
    assert not process.is_running()
    assert client._process.returncode == 0
    await client.close()
    del client, handle
    await asyncio.sleep(0.05)  # transports close in the loop's next rounds
    assert held() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_group_do_not_end_it(client: EngineClient, number: signal.Signals) -> None:
    async with client.request(a_submit("r", a_prompt(30), max_tokens=LONG)) as handle:
        await handle.next(30)
        os.kill(client._process.pid, number)
        tokens = await to_the_end(handle)
    assert len(tokens) == LONG - 1
    assert not client.dead


FRONT = """
import asyncio, sys
from pathlib import Path
from baton.engine.client import EngineClient
from baton.engine.config import EngineConfig
from baton.engine.messages import Role, SamplingParams, Submit

async def main():
    client = await EngineClient.start(EngineConfig(model=Path(sys.argv[1])))
    sampling = SamplingParams(max_tokens=450 if sys.argv[2] == "busy" else 1, ignore_eos=True)
    submit = Submit(request_id="r", role=Role.GENERATE, token_ids=[5] * 30, num_prompt_tokens=30, sampling=sampling)
    async with client.request(submit) as handle:
        await handle.next(30)
        if sys.argv[2] == "idle":
            await asyncio.sleep(0.2)  # until all was said and read
        print(client._process.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
async def test_the_engine_ends_with_its_front(llama: Path, state: str) -> None:
    front = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FRONT, str(llama), state),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert front.stdout is not None
        engine = psutil.Process(int(await front.stdout.readline()))
        assert engine.is_running()
    finally:
        front.kill()
        await front.wait()
    await until_gone(engine)
