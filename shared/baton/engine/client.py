"""The front's side of an engine process: submit requests, read their events. asyncio; no torch."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from baton.engine.config import EngineConfig
from baton.engine.frames import BrokenStream, frame
from baton.engine.handle import EngineDied, RequestEvent, RequestHandle
from baton.engine.launch import EngineProcess, OnProgress, launch
from baton.engine.messages import (
    Command,
    DebugState,
    Event,
    Failed,
    Inspect,
    KvReady,
    Output,
    PrefixChanges,
    Progress,
    Release,
    Reserved,
    StepReport,
    Stop,
    Submit,
    command_encoder,
    event_decoder,
)
from baton.engine.prefix_mirror import PrefixMirror
from baton.engine.watchdog import Silence, Verdict, processor_delays

__all__ = ["EngineClient", "EngineDied", "RequestEvent", "RequestHandle"]


async def _tell_nobody(stalled: bool) -> None:
    pass


class EngineClient:
    """A running engine process.

    Attributes:
        spec: of the model it serves.
        layout: of its KV pool.
        memory: the pool's bytes, shared with the engine.
        memory_fd: the file they are; closed by `close`.
        capacity_tokens: KV tokens of all requests together.
        max_context: tokens of one request, prompt and output.
        exact: its tokens do not depend on batch or chunks, bit for bit, as far as its self-test saw.
        incarnation: random id of this engine process.
        stalled: it has not answered for a while, though it could have.
        on_report: called with every StepReport.
        prefixes: what its prefix cache holds.
    """

    def __init__(self, engine: EngineProcess) -> None:
        self.spec = engine.ready.spec
        self.layout = engine.ready.layout
        self.memory = memoryview(engine.memory)
        self.memory_fd = engine.memory_fd
        self.capacity_tokens = engine.ready.capacity_tokens
        self.max_context = engine.ready.max_context
        self.exact = engine.ready.exact
        self.incarnation = secrets.token_hex(8)
        self.on_report: list[Callable[[StepReport], None]] = []
        self.stalled = False
        self.prefixes = PrefixMirror()
        self._pid = engine.ready.pid
        self._process = engine.process
        self._reader = engine.reader
        self._writer = engine.writer
        self._unframer = engine.unframer
        self._handles: dict[str, RequestHandle] = {}
        self._inspections: dict[int, asyncio.Future[DebugState]] = {}
        self._numbers = itertools.count(1)
        self._dead = asyncio.Event()
        self._epitaph = ""
        self._longest_step = 0.0  # seconds
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        on_progress: OnProgress = lambda stage, fraction: None,
        timeout: float = 300.0,
        *,
        own_cores: bool = False,
    ) -> EngineClient:
        """As `launch`.

        Raises:
            EngineError: it cannot serve this model, ended, or was not ready within `timeout` seconds.
        """
        return cls(await launch(config, on_progress, timeout, own_cores=own_cores))

    @property
    def dead(self) -> bool:
        """Whether the engine is gone."""
        return self._dead.is_set()

    @property
    def epitaph(self) -> str:
        """How it went, once it is gone."""
        return self._epitaph

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[RequestHandle]:
        """A request that lives as long as the block: leaving it frees everything it holds in the engine.

        Within the block nobody else may still write into the request's slot when it is left.

        Raises:
            EngineDied: the engine is gone.
        """
        # The id of an attempt: a late event of an earlier one never reaches its successor.
        engine_id = f"{submit.request_id}#{next(self._numbers)}"
        handle = RequestHandle(self, engine_id)
        self._handles[engine_id] = handle
        try:
            self.send(msgspec.structs.replace(submit, request_id=engine_id))
            yield handle
        finally:
            del self._handles[engine_id]
            if not self.dead:
                self.send(Release(engine_id))

    async def inspect(self) -> DebugState:
        """What the engine holds, after all commands sent so far.

        Raises:
            EngineDied: the engine is gone.
        """
        number = next(self._numbers)
        future: asyncio.Future[DebugState] = asyncio.get_running_loop().create_future()
        self._inspections[number] = future
        try:
            self.send(Inspect(number))
            return await future
        finally:
            del self._inspections[number]

    def send(self, command: Command) -> None:
        """Queue a command. What may wait here is bounded by the calls the front serves.

        Raises:
            EngineDied: the engine is gone.
        """
        if self.dead:
            raise EngineDied(self._epitaph)
        self._writer.write(frame(command_encoder.encode([command])))

    async def check_alive(
        self, silence: float, tell: Callable[[bool], Awaitable[None]] = _tell_nobody, interval: float = 0.25
    ) -> None:
        """Watch the engine until it is gone; one that does not answer any more is killed.

        Args:
            silence: seconds it may not answer, or ten of its longest steps if that is longer; half of that, and it is
                `stalled`. Time in which it, or we, waited for a processor does not count.
            tell: called with whether it is stalled, when that changes.
            interval: seconds between two looks.
        """
        while not self.dead:
            asking = asyncio.create_task(self.inspect())
            try:
                await self._await_answer(asking, silence, tell, interval)
            finally:
                asking.cancel()  # if nobody waits for it any more
            if not asking.exception() and self.stalled:
                self.stalled = False
                await tell(False)
            await asyncio.sleep(interval)

    async def _await_answer(
        self, asking: asyncio.Task[DebugState], allowed: float, tell: Callable[[bool], Awaitable[None]], interval: float
    ) -> None:
        """Until it answered or is gone, for which it is killed if need be."""
        loop = asyncio.get_running_loop()
        silence, looked = Silence(interval, processor_delays(self._pid)), loop.time()
        while not asking.done():
            await asyncio.wait([asking], timeout=interval)
            if asking.done():
                return
            now = loop.time()
            silence.looked(now - looked, processor_delays(self._pid))
            looked = now
            verdict = silence.verdict(allowed, self._longest_step)
            if verdict is not Verdict.WAIT and not self.stalled:
                self.stalled = True
                await tell(True)
            if verdict is Verdict.HUNG:
                self._epitaph = f"the engine said nothing for {silence.seconds:.1f} s and was killed"
                self._process.kill()
                await asyncio.wait([asking])

    async def wait_dead(self) -> None:
        """Until the engine is gone, for whatever reason."""
        await self._dead.wait()

    async def close(self, timeout: float = 5.0) -> None:
        """Stop the engine; kill it if it takes longer than `timeout` seconds. All its memory is gone afterwards."""
        if not self.dead:
            self.send(Stop())
        try:
            async with asyncio.timeout(timeout):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading
        self._writer.close()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    async def _read(self) -> None:
        """Hand events out until the engine is gone."""
        try:
            while data := await self._reader.read(1 << 20):
                for body in self._unframer.feed(data):
                    for event in event_decoder.decode(body):
                        self._dispatch(event)
        except ConnectionError:
            pass  # the process ended before it had read everything; to kill it would lose its status
        except (BrokenStream, msgspec.DecodeError) as error:
            self._epitaph = f"the engine's events broke off: {error}"
            self._process.kill()
        status = await self._process.wait()
        if not self._epitaph:
            self._epitaph = f"the engine process ended with status {status}" if status else "the engine was stopped"
        self._dead.set()
        for handle in self._handles.values():
            handle.wake()
        for future in self._inspections.values():
            if not future.done():
                future.set_exception(EngineDied(self._epitaph))

    def _dispatch(self, event: Event) -> None:
        match event:
            case StepReport():
                self._longest_step = max(self._longest_step, event.duration_ns / 1e9)
                for listener in self.on_report:
                    listener(event)
            case PrefixChanges():
                self.prefixes.take(event)
            case DebugState():
                future = self._inspections.get(event.token)
                if future is not None and not future.done():
                    future.set_result(event)
            case Reserved() | KvReady() | Progress() | Output() | Failed():
                # A request that was released meanwhile has no handle any more.
                if (handle := self._handles.get(event.request_id)) is not None:
                    handle.push(event)
