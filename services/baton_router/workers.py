"""The live view of the workers: one `Worker.Watch` stream to each, which is health and load in one.

A worker is in the view exactly while its stream speaks. One that falls silent is lost: calls running there are
cancelled by the view, because a hung process keeps its connections. One whose stream ends or fails is only taken out of
the view: its calls find out by themselves, and a draining worker still finishes them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import grpc
from prometheus_client import Gauge

from baton.internal.v1 import decode_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.channel import ChannelPool
from baton.rpc.patience import patience
from baton_router.placement import UNQUANTIZED, Candidate
from baton_router.targets import resolve_target

log = logging.getLogger(__name__)

WORKERS = Gauge("baton_workers", "Workers in the router's view", ["tier"])

_FIRST_BACKOFF = 0.05  # seconds
_LAST_BACKOFF = 1.0
_TIERS = {worker_pb2.WORKER_ROLE_DECODE: "decode", worker_pb2.WORKER_ROLE_PREFILL: "prefill"}

for _tier in _TIERS.values():
    WORKERS.labels(_tier)  # a router that never saw a worker says 0, or the alert has nothing to compare


class Cancellable(Protocol):
    """A call in progress."""

    def cancel(self) -> bool: ...


class Worker:
    """One worker process, from its first state message until it leaves the view.

    Attributes:
        state: what it last said.
        told: when, on the monotonic clock.
        in_flight: requests this router has there.
        hung: it fell silent, and its calls were cancelled for that.
    """

    __slots__ = ("_calls", "hung", "in_flight", "state", "target", "told")

    def __init__(self, target: str, state: worker_pb2.WatchResponse) -> None:
        self.target = target
        self.state = state
        self.told = time.monotonic()
        self.in_flight = 0
        self.hung = False
        self._calls: set[Cancellable] = set()

    def candidate(self) -> Candidate:
        """As placement sees it."""
        return Candidate(
            target=self.target,
            incarnation=self.state.incarnation,
            fingerprint=self.state.model.fingerprint,
            quantization=self.state.model.quantization or UNQUANTIZED,
            in_flight=self.in_flight,
            slots=self.state.capacity.slots,
            draining=self.state.draining,
        )

    def prefill_candidate(self) -> decode_pb2.PrefillCandidate:
        """As decode is told of it, which decides whether to use it."""
        load = self.state.load
        cost = load.step_cost if load.HasField("step_cost") else None
        return decode_pb2.PrefillCandidate(
            target=self.target,
            waiting_prompt_tokens=load.waiting_prompt_tokens,
            step_cost=cost,
            age_ms=int((time.monotonic() - self.told) * 1000),
        )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count a request as being there for the length of the block."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextmanager
    def running(self, call: Cancellable) -> Iterator[None]:
        """Have the call cancelled should the worker fall silent."""
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def silent(self) -> None:
        """It hangs: end what runs there."""
        self.hung = True
        for call in list(self._calls):
            call.cancel()


class WorkerView:
    """All workers of both tiers that can be used now.

    Args:
        channels: to the workers; shared with the calls.
        tokenizer_digest: of this router; a worker with another one is not used.
        silence: seconds without a word after which a worker is lost.
        resolve_every: seconds between two looks at names.
    """

    def __init__(self, channels: ChannelPool, tokenizer_digest: str, silence: float, resolve_every: float) -> None:
        self._channels = channels
        self._tokenizer_digest = tokenizer_digest
        self._silence = silence
        self._resolve_every = resolve_every
        self._workers: dict[str, dict[str, Worker]] = {"decode": {}, "prefill": {}}
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def watching(self, decode: Sequence[str], prefill: Sequence[str]) -> AsyncIterator[None]:
        """Keep the view up to date for the length of the block."""
        async with asyncio.TaskGroup() as group:
            following = [
                group.create_task(self._follow_target(role, target))
                for role, targets in (
                    (worker_pb2.WORKER_ROLE_DECODE, decode),
                    (worker_pb2.WORKER_ROLE_PREFILL, prefill),
                )
                for target in targets
            ]
            try:
                yield
            finally:
                for task in following:
                    task.cancel()

    def decode(self) -> list[Candidate]:
        """Decode workers that can be used."""
        return [worker.candidate() for worker in self._workers["decode"].values()]

    def prefill(self) -> list[Candidate]:
        """Prefill workers that can be used."""
        return [worker.candidate() for worker in self._workers["prefill"].values()]

    def workers(self) -> list[Worker]:
        """All of them, decode first."""
        return [worker for tier in self._workers.values() for worker in tier.values()]

    def worker(self, tier: str, candidate: Candidate) -> Worker | None:
        """The worker behind a candidate, if it is still there."""
        found = self._workers[tier].get(candidate.target)
        return found if found is not None and found.state.incarnation == candidate.incarnation else None

    def model(self, fingerprint: str) -> worker_pb2.WorkerModel | None:
        """What decode workers say of a model; the smallest context, where they differ."""
        models = [w.state.model for w in self._workers["decode"].values() if w.state.model.fingerprint == fingerprint]
        return min(models, key=lambda model: model.max_context, default=None)

    async def wait_change(self, seconds: float) -> None:
        """Wait until the view changed, so long at most."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _follow_target(self, role: worker_pb2.WorkerRole.ValueType, target: str) -> None:
        """Watch every address of a target, starting and stopping watches as its addresses change."""
        watches: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    addresses = await resolve_target(target)
                except OSError as error:
                    # A name server that is down says nothing about the workers: keep those we have.
                    log.warning("cannot resolve %s: %s", target, error)
                    addresses = list(watches)
                for address in addresses:
                    if address not in watches:
                        watches[address] = group.create_task(self._follow_worker(role, address))
                for address in set(watches) - set(addresses):
                    watches.pop(address).cancel()
                await asyncio.sleep(self._resolve_every)

    async def _follow_worker(self, role: worker_pb2.WorkerRole.ValueType, target: str) -> None:
        """Watch one address for ever; reconnects with a growing, bounded pause."""
        backoff = _FIRST_BACKOFF
        told = False  # once per absence
        while True:
            watched = False
            try:
                async for _ in self._watch(role, target):
                    watched = True
            except TimeoutError:
                log.warning("%s %s is silent", _TIERS[role], target)
            except grpc.aio.AioRpcError as error:
                if watched or not told:
                    log.info("%s %s is not there: %s", _TIERS[role], target, error.code().name)
                told = True
            if watched:
                told = False
            backoff = _FIRST_BACKOFF if watched else min(backoff * 2, _LAST_BACKOFF)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    async def _watch(self, role: worker_pb2.WorkerRole.ValueType, target: str) -> AsyncIterator[None]:
        """One state stream, from its start to its end."""
        interval_ms = max(50, int(self._silence * 1000 / 5))
        async with self._channels.channel(target) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest(interval_ms=interval_ms))
            messages = aiter(call)
            worker: Worker | None = None
            try:
                while True:
                    async with patience(self._silence):
                        state = await anext(messages, None)
                    if state is None:
                        return
                    worker = self._take(role, target, worker, state)
                    yield
            except TimeoutError:
                if worker is not None:
                    worker.silent()
                raise
            finally:
                call.cancel()
                self._drop(role, target)

    def _take(
        self, role: worker_pb2.WorkerRole.ValueType, target: str, worker: Worker | None, state: worker_pb2.WatchResponse
    ) -> Worker | None:
        """Account for a state message."""
        if worker is None or worker.state.incarnation != state.incarnation:
            if not self._usable(role, target, state):
                return None
            worker = Worker(target, state)
            self._workers[_TIERS[role]][target] = worker
            log.info("%s %s is there", _TIERS[role], target, extra={"fingerprint": state.model.fingerprint})
            self._announce()
        elif worker.state.draining != state.draining:
            self._announce()
        worker.state, worker.told = state, time.monotonic()
        return worker

    def _usable(self, role: worker_pb2.WorkerRole.ValueType, target: str, state: worker_pb2.WatchResponse) -> bool:
        if state.role != role:
            log.error("%s is no %s worker; it is not used", target, _TIERS[role])
            return False
        if state.model.tokenizer_digest != self._tokenizer_digest:
            log.error(
                "%s %s has another tokenizer; it is not used",
                _TIERS[role],
                target,
                extra={"here": self._tokenizer_digest, "there": state.model.tokenizer_digest},
            )
            return False
        return True

    def _drop(self, role: worker_pb2.WorkerRole.ValueType, target: str) -> None:
        if self._workers[_TIERS[role]].pop(target, None) is not None:
            self._announce()

    def _announce(self) -> None:
        for tier, workers in self._workers.items():
            WORKERS.labels(tier).set(len(workers))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
