"""When requests are sent, and the sending: open loop (Poisson arrivals) or closed loop (fixed concurrency)."""

from __future__ import annotations

import asyncio
import gc
import random
import selectors
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import grpc

from baton.bench.record import OK, Record
from baton.bench.workload import Job
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

MAX_IN_FLIGHT: Final = 4096
"""Open-loop requests at once; more end as CLIENT_LIMIT without being sent."""
CLIENT_LIMIT: Final = "CLIENT_LIMIT"
_HEARTBEAT: Final = 0.01
"""Seconds between two looks at how late the event loop is."""
_ANSWERED: Final = (
    inference_pb2.CACHE_STATUS_HIT,
    inference_pb2.CACHE_STATUS_COALESCED,
    inference_pb2.CACHE_STATUS_SEMANTIC,
)


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked. Exactly one of rate and concurrency, at least one of requests and duration."""

    rate: float | None = None
    """Open loop: mean requests per second, Poisson."""
    concurrency: int | None = None
    """Closed loop: requests in flight at all times."""
    requests: int | None = None
    duration: float | None = None
    """Seconds during which requests are sent; what runs then is waited for."""
    warmup: int = 0
    """Requests made first, one by one, and not measured."""

    def __post_init__(self) -> None:
        assert (self.rate is None) != (self.concurrency is None)
        assert self.requests is not None or self.duration is not None


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests have in common."""

    model: str = ""
    temperature: float = 0.0
    ignore_eos: bool = True
    """Answers have exactly the length asked for."""
    bypass_cache: bool = True
    timeout: float = 300.0
    """Deadline of one request, seconds."""

    def request(self, job: Job) -> inference_pb2.StreamGenerateRequest:
        """A job as it goes over the wire."""
        sampling = sampling_pb2.SamplingParams(
            max_tokens=job.output_tokens, temperature=self.temperature, seed=job.seed, ignore_eos=self.ignore_eos
        )
        request = inference_pb2.StreamGenerateRequest(model=self.model, sampling=sampling)
        if isinstance(job.prompt, str):
            request.text = job.prompt
        else:
            request.token_ids.ids.extend(job.prompt)
        if self.bypass_cache:
            request.cache_control.mode = inference_pb2.CACHE_MODE_BYPASS
        return request


@dataclass(slots=True)
class Progress:
    """How far a run is; read by whoever shows it."""

    sent: int = 0
    done: int = 0
    failed: int = 0


@dataclass(slots=True)
class Run:
    """What a run saw."""

    records: list[Record] = field(default_factory=list)
    loop_lag_ns: list[int] = field(default_factory=list)
    """How late the event loop woke up, sampled throughout: lateness that every received message shares."""
    began_ns: int = 0

    def lag_ns(self, load: Load) -> list[int]:
        """The generator's own lag: late sends in open loop, late wake-ups in closed loop, which has no schedule."""
        if load.rate is not None:
            return [record.lag_ns for record in self.records if record.sent_ns]
        return self.loop_lag_ns


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are good to 0.1 ms. asyncio's usual one rounds them up to whole milliseconds.

    select() takes file numbers below 1024 only. gRPC shows asyncio a single one, whatever the number of requests.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Generator:
    """Makes requests of one workload.

    Args:
        stub: the router's.
        asking: what all requests have in common.
        jobs: what to ask, endless.
        progress: kept up to date.
    """

    def __init__(
        self, stub: inference_pb2_grpc.InferenceAsyncStub, asking: Asking, jobs: Iterator[Job], progress: Progress
    ) -> None:
        self._stub = stub
        self._asking = asking
        self._jobs = jobs
        self._progress = progress

    async def run(self, load: Load, seed: int) -> Run:
        """Make all requests and wait for their ends. Failed requests are records, not errors."""
        for _ in range(load.warmup):
            await self._ask(Record(time.monotonic_ns()), self._next())
        run = Run()
        # A collection of everything imported so far takes tens of milliseconds: not in the middle of a measurement.
        gc.collect()
        gc.freeze()
        beating = asyncio.create_task(heartbeat(run.loop_lag_ns))
        try:
            run.began_ns = time.monotonic_ns()
            if load.rate is not None:
                await self._open_loop(run, load, load.rate, random.Random(seed))
            else:
                await self._closed_loop(run, load)
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            gc.unfreeze()
        return run

    async def _open_loop(self, run: Run, load: Load, rate: float, rng: random.Random) -> None:
        due = run.began_ns
        async with asyncio.TaskGroup() as group:
            while True:
                due += round(rng.expovariate(rate) * 1e9)
                if _enough(load, len(run.records), due - run.began_ns):
                    return
                request = self._next()
                await _sleep_until(due)
                record = Record(scheduled_ns=due)
                run.records.append(record)
                if self._progress.sent - self._progress.done >= MAX_IN_FLIGHT:
                    record.code, record.done_ns = CLIENT_LIMIT, time.monotonic_ns()
                    continue
                group.create_task(self._tracked(record, request))

    async def _closed_loop(self, run: Run, load: Load) -> None:
        async def worker() -> None:
            while not _enough(load, len(run.records), time.monotonic_ns() - run.began_ns):
                request = self._next()
                record = Record(scheduled_ns=time.monotonic_ns())
                run.records.append(record)
                await self._tracked(record, request)

        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency or 0):
                group.create_task(worker())

    def _next(self) -> inference_pb2.StreamGenerateRequest:
        return self._asking.request(next(self._jobs))

    async def _tracked(self, record: Record, request: inference_pb2.StreamGenerateRequest) -> None:
        self._progress.sent += 1
        await self._ask(record, request)
        self._progress.done += 1
        self._progress.failed += not record.ok

    async def _ask(self, record: Record, request: inference_pb2.StreamGenerateRequest) -> None:
        clock = time.monotonic_ns
        record.sent_ns = clock()
        call = self._stub.StreamGenerate(request, timeout=self._asking.timeout)
        try:
            async for message in call:
                now = clock()
                event = message.WhichOneof("event")
                if event == "chunk" and message.chunk.token_ids:
                    record.token_times_ns.append(now)
                    record.output_tokens += len(message.chunk.token_ids)
                elif event == "summary":
                    record.prompt_tokens = message.summary.usage.prompt_tokens
                    record.cached_prompt_tokens = message.summary.usage.cached_prompt_tokens
                    record.response_cache = message.summary.cache_status in _ANSWERED
                record.done_ns = now
            record.code = OK
        except grpc.aio.AioRpcError as error:
            record.done_ns = clock()
            record.code = error.code().name


def _enough(load: Load, made: int, elapsed_ns: int) -> bool:
    if load.requests is not None and made >= load.requests:
        return True
    return load.duration is not None and elapsed_ns >= load.duration * 1e9


async def _sleep_until(due_ns: int) -> None:
    delay = (due_ns - time.monotonic_ns()) / 1e9
    # Even when late: the answers' messages must be read in between.
    await asyncio.sleep(max(0.0, delay))


async def heartbeat(lags_ns: list[int]) -> None:
    """Note how late this event loop wakes up, nanoseconds, until cancelled."""
    due = time.monotonic_ns()
    while True:
        due += round(_HEARTBEAT * 1e9)
        await _sleep_until(due)
        now = time.monotonic_ns()
        lags_ns.append(max(0, now - due))
        due = max(due, now)
