"""Asks the mesh, as many clients at a time as wanted, and writes down all they see."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc
from google.rpc import error_details_pb2, status_pb2

from baton.client import ledger as client_ledger
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.faults.history import Asked, Attempt, Chunk, Ended, History, Question, Started, Summed

_GIVE_UP = 30.0  # seconds past its deadline at which a client stops waiting for a status
_AGAIN = 0.05  # seconds a client waits before it asks the next router
_SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
"""Of clients that read slowly: else a megabyte is on its way to them before the router notices."""
_CHANNELS = 4  # connections to each router


@dataclass(frozen=True, slots=True)
class Load:
    """Who asks what.

    Attributes:
        streams: requests at a time.
        requests: how many in all; 0: as many as `seconds` allow.
        seconds: how long; 0: until all requests were asked.
        deadline: of a patient request, seconds.
        cancels: share of requests whose client cancels, at a random moment within `cancel_within` seconds.
        hurried: share of requests whose deadline, drawn from `hurry`, may well pass.
        slow: share of clients that read one message per `slow_seconds`.
        silent: share of clients that read nothing for `silent_seconds`.
        resumes: whether clients go on at another router after UNAVAILABLE.
        cached: whether requests use the response cache.
        prefix_cached: share of requests that may use the workers' prefix caches; other prompts are computed anew.
        ping_seconds: how often clients ping a silent router, and wait for its answer; 0: never, so that none takes a
            machine that is busy for a router that is gone.
        per_second: arrivals, Poisson, with at most `streams` at a time; 0: the next request when one has ended.
    """

    streams: int = 64
    requests: int = 0
    seconds: float = 0.0
    deadline: float = 60.0
    cancels: float = 0.0
    cancel_within: float = 0.5
    hurried: float = 0.0
    hurry: tuple[float, float] = (0.01, 0.6)
    slow: float = 0.0
    slow_seconds: float = 1.0
    silent: float = 0.0
    silent_seconds: float = 5.0
    resumes: bool = False
    cached: bool = False
    prefix_cached: float = 0.5
    ping_seconds: float = 0.0
    per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Manner:
    """How one client behaves."""

    kind: str = "patient"
    deadline: float = 60.0
    cancel_after: float | None = None
    read_every: float = 0.0
    read_after: float = 0.0


def manner(load: Load, rng: random.Random) -> Manner:
    """Draw one."""
    chance = rng.random()
    for share, make in (
        (load.cancels, lambda: Manner("cancels", load.deadline, cancel_after=rng.random() ** 2 * load.cancel_within)),
        (load.hurried, lambda: Manner("hurried", rng.uniform(*load.hurry))),
        (load.slow, lambda: Manner("slow", load.deadline, read_every=load.slow_seconds)),
        (load.silent, lambda: Manner("never reads", load.deadline, read_after=load.silent_seconds)),
    ):
        if chance < share:
            return make()
        chance -= share
    return Manner(deadline=load.deadline)


@dataclass(slots=True)
class Progress:
    """How far a load is. `changed` is set whenever a request ends."""

    begun_at: float = field(default_factory=time.monotonic)
    ended: int = 0
    total: int = 0
    seconds: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def share(self) -> float:
        """Of the load, that is done."""
        if self.total:
            return self.ended / self.total
        return (time.monotonic() - self.begun_at) / self.seconds if self.seconds else 0.0


class Driver:
    """Clients of a mesh.

    Args:
        book: what they ask.
        routers: host:port of each, in the order in which clients prefer them.
    """

    def __init__(self, book: Sequence[Question], routers: Callable[[], Sequence[str]], seed: int = 0) -> None:
        self.history = History(tuple(book))
        self.progress = Progress()
        self._routers = routers
        self._rng = random.Random(seed)
        self._stubs: dict[str, list[inference_pb2_grpc.InferenceAsyncStub]] = {}
        self._stack = AsyncExitStack()
        self._turn = itertools.count()
        self.goes_on: Callable[[], bool] = lambda: False
        """A load of so many seconds goes on as long as this says so."""

    async def __aenter__(self) -> Driver:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def run(self, load: Load) -> History:
        """Ask until the load is through; the history is closed then."""
        progress = self.progress = Progress(total=load.requests, seconds=load.seconds)
        order = itertools.count()
        places = asyncio.Semaphore(load.streams)

        async def client() -> None:
            while self._more(load, number := next(order)):
                await self.ask(number % len(self.history.book), load, manner(load, self._rng))

        async def arrival(number: int) -> None:
            async with places:
                await self.ask(number % len(self.history.book), load, manner(load, self._rng))

        async with asyncio.TaskGroup() as group:
            if load.per_second:
                while self._more(load, number := next(order)):
                    group.create_task(arrival(number))
                    await asyncio.sleep(self._rng.expovariate(load.per_second))
            else:
                for _ in range(load.streams):
                    group.create_task(client())
        progress.seconds = progress.seconds or time.monotonic() - progress.begun_at
        self.history.closed_at = time.monotonic()
        return self.history

    def _more(self, load: Load, number: int) -> bool:
        if load.requests:
            return number < load.requests
        return time.monotonic() - self.progress.begun_at < load.seconds or self.goes_on()

    async def ask(self, question: int, load: Load, how: Manner) -> Asked:
        """One client's request, to its end."""
        asked = Asked(len(self.history.requests), question, how.kind)
        self.history.requests.append(asked)
        end = time.monotonic() + how.deadline
        routers = list(self._routers())
        try:
            for turn in itertools.count(asked.number):
                router = routers[turn % len(routers)]
                request_id = f"fault-{secrets.token_hex(4)}-{asked.number}"
                attempt = Attempt(request_id, router, time.monotonic(), end, delivered=len(asked.tokens))
                asked.attempts.append(attempt)
                await self._call(asked, attempt, load, how)
                if not load.resumes or asked.code != "UNAVAILABLE" or time.monotonic() + _AGAIN > end:
                    return asked
                await asyncio.sleep(_AGAIN)
                routers = list(self._routers())
            return asked
        finally:
            self.progress.ended += 1
            self.progress.changed.set()
            self.progress.changed = asyncio.Event()

    async def _call(self, asked: Asked, attempt: Attempt, load: Load, how: Manner) -> None:
        question = self.history.book[asked.question]
        mode = inference_pb2.CACHE_MODE_USE if load.cached else inference_pb2.CACHE_MODE_BYPASS
        request = inference_pb2.StreamGenerateRequest(
            token_ids=sampling_pb2.TokenIds(ids=question.prompt),
            sampling=sampling_pb2.SamplingParams(**question.sampling),  # type: ignore[arg-type]
            cache_control=inference_pb2.CacheControl(mode=mode, prefix_cache=self._rng.random() < load.prefix_cached),
        )
        if attempt.delivered:
            request.resume_from.ids.extend(asked.tokens)
        call = self._stub(
            attempt.router, load.ping_seconds, small=bool(how.read_every or how.read_after)
        ).StreamGenerate(
            request,
            timeout=max(0.001, attempt.deadline_at - time.monotonic()),
            metadata=(("x-request-id", attempt.request_id),),
        )
        cancelling = None
        if how.cancel_after is not None:
            cancelling = asyncio.create_task(_cancel(call, attempt, how.cancel_after))
        try:
            async with asyncio.timeout(how.deadline + _GIVE_UP):
                await _read(call, attempt, how)
        except TimeoutError:
            call.cancel()  # without a status, as the checker will find
        finally:
            if cancelling is not None:
                cancelling.cancel()
                await asyncio.gather(cancelling, return_exceptions=True)

    def _stub(self, router: str, ping_seconds: float, *, small: bool = False) -> inference_pb2_grpc.InferenceAsyncStub:
        key = f"{router} {ping_seconds} {small}"
        if key not in self._stubs:
            # Connections of their own, so that no two clients share what happens to one.
            options = [
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 2000),
                ("grpc.max_reconnect_backoff_ms", 1000),
                *(_SMALL_WINDOW if small else ()),
                *(_pinging(ping_seconds) if ping_seconds else ()),
            ]
            channels = [grpc.aio.insecure_channel(router, options=options) for _ in range(_CHANNELS)]
            for channel in channels:
                self._stack.push_async_callback(channel.close, None)
            self._stubs[key] = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        return self._stubs[key][next(self._turn) % _CHANNELS]


def _pinging(seconds: float) -> tuple[tuple[str, int], ...]:
    """Options of a client that finds a frozen router, or a link that swallows everything, in twice so long."""
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    return (*((name, int(seconds * 1000)) for name in names), ("grpc.http2.max_pings_without_data", 0))


async def _cancel(call: grpc.aio.UnaryStreamCall, attempt: Attempt, after: float) -> None:
    await asyncio.sleep(after)
    if attempt.ended is None:
        attempt.cancelled_at = time.monotonic()
        call.cancel()


async def _read(call: grpc.aio.UnaryStreamCall, attempt: Attempt, how: Manner) -> None:
    """All messages and the status, into the attempt."""
    try:
        for key, _ in await call.initial_metadata():
            if key == "x-request-id" and attempt.accepted_at is None:
                attempt.accepted_at = time.monotonic()
        await asyncio.sleep(how.read_after)
        async for message in call:
            attempt.events.extend(_events(message))
            if how.read_every:
                await asyncio.sleep(how.read_every)
    except grpc.aio.AioRpcError:
        pass  # its status is read below
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if attempt.cancelled_at is None or (task is not None and task.cancelling()):
            raise
    code = await call.code()
    attempt.events.append(_ended(code, await call.details() or "", await call.trailing_metadata()))


def _events(message: inference_pb2.StreamGenerateResponse) -> Iterator[Started | Chunk | Summed]:
    now = time.monotonic()
    match message.WhichOneof("event"):
        case "start":
            yield Started(now, message.start.request_id)
        case "chunk":
            yield Chunk(now, message.chunk.index, tuple(message.chunk.token_ids))
        case "summary":
            summary = message.summary
            yield Summed(
                now,
                sampling_pb2.FinishReason.Name(summary.finish_reason),
                summary.usage.completion_tokens,
                summary.migrations,
                summary.preemptions,
                remote=summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE,
                from_cache=summary.cache_status
                in (inference_pb2.CACHE_STATUS_HIT, inference_pb2.CACHE_STATUS_COALESCED),
                seconds=_seconds(summary),
            )


def _seconds(summary: inference_pb2.Summary) -> dict[str, float]:
    total = client_ledger.from_proto(summary.ledger).total
    return {} if total is None else {kind: ns / 1e9 for kind, ns in total.by_kind().items()}


def _ended(code: grpc.StatusCode, details: str, trailing: object) -> Ended:
    reason, retry = "", None
    for key, value in trailing or ():  # type: ignore[attr-defined]
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info, again = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    reason = str(info.reason)
                elif detail.Unpack(again):
                    retry = again.retry_delay.ToTimedelta().total_seconds()
    return Ended(time.monotonic(), code.name, reason, retry, details)
