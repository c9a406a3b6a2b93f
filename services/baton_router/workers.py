"""The live view of the workers: one `Worker.Watch` stream to each, which is health and load in one.

A worker is in the view exactly while its stream speaks. One that falls silent is lost: calls running there are
cancelled by the view, because a hung process keeps its connections. One whose stream ends or fails is only taken out of
the view: its calls find out by themselves, and a draining worker still finishes them. If the same process comes back,
they are its calls as before; if it says nothing when it is watched anew, they are cancelled, too.

Each tier is one pool; which model a worker serves is known from its tokenizer and name, and which of them may continue
each other's requests from their fingerprints. Workers that cannot be used are known as well, with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from prometheus_client import Counter, Gauge

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc.channel import ChannelPool
from baton.rpc.patience import patience
from baton_router.fitness import TIERS, Refusal, Unfit, refusal
from baton_router.models import Models
from baton_router.placement import Candidate
from baton_router.prefixes import Gap
from baton_router.targets import resolve_target
from baton_router.worker import Worker

log = logging.getLogger(__name__)

WORKERS = Gauge("baton_workers", "Workers in the router's view", ["tier"])
MODEL_WORKERS = Gauge("baton_model_workers", "Workers in the router's view, by the model they serve", ["tier", "model"])
UNUSED_WORKERS = Gauge("baton_unused_workers", "Workers that answer and are not used, by reason", ["tier", "reason"])
PREFIX_BLOCKS = Gauge("baton_router_prefix_blocks", "Blocks of prefix caches that the router knows of", ["tier"])
PREFIX_RESYNCS = Counter("baton_router_prefix_resyncs_total", "Times a worker's prefixes had to be learned anew")

_FIRST_BACKOFF = 0.05  # seconds
_LAST_BACKOFF = 1.0

for _tier in TIERS.values():
    WORKERS.labels(_tier)  # a router that never saw a worker says 0, or the alert has nothing to compare
    PREFIX_BLOCKS.labels(_tier)
    for _unfit in Unfit:
        UNUSED_WORKERS.labels(_tier, _unfit)


@dataclass(frozen=True, slots=True)
class Unused:
    """A worker that answers and is not used."""

    target: str
    tier: str
    state: worker_pb2.WatchResponse
    refusal: Refusal


class WorkerView:
    """All workers of both tiers that can be used now.

    Args:
        channels: to the workers; shared with the calls.
        models: of this router; a worker of none of them is not used.
        silence: seconds without a word after which a worker is lost.
        resolve_every: seconds between two looks at names.
        prefix_key: by which workers tell what their prefix caches hold; empty: they need not tell.

    Attributes:
        version: rises whenever a worker comes, leaves, drains, or says something else of its model.
    """

    def __init__(
        self, channels: ChannelPool, models: Models, silence: float, resolve_every: float, prefix_key: bytes = b""
    ) -> None:
        self._channels = channels
        self._models = models
        self._silence = silence
        self._resolve_every = resolve_every
        self._prefix_key = prefix_key
        self._workers: dict[str, dict[str, Worker]] = {"decode": {}, "prefill": {}}
        self._left: dict[tuple[str, str], Worker] = {}  # out of the view, with calls that run there
        self._unused: dict[tuple[str, str], Unused] = {}
        self._complained: dict[tuple[str, str], tuple[str, Unfit]] = {}
        self._changed = asyncio.Event()
        self.version = 0

    @asynccontextmanager
    async def watching(self, decode: Sequence[str], prefill: Sequence[str]) -> AsyncIterator[None]:
        """Keep the view up to date for the length of the block."""
        async with asyncio.TaskGroup() as group:
            following = [
                group.create_task(self._follow_target(tier, target))
                for tier, targets in (("decode", decode), ("prefill", prefill))
                for target in targets
            ]
            try:
                yield
            finally:
                for task in following:
                    task.cancel()

    def decode(self, model: str) -> list[Candidate]:
        """Decode workers of a model."""
        return [worker.candidate() for worker in self._workers["decode"].values() if worker.model == model]

    def prefill(self, model: str) -> list[Candidate]:
        """Prefill workers of a model."""
        return [worker.candidate() for worker in self._workers["prefill"].values() if worker.model == model]

    def tier(self, tier: str) -> list[Worker]:
        """Workers of a tier, whatever they serve."""
        return list(self._workers[tier].values())

    def workers(self) -> list[Worker]:
        """All of them, decode first."""
        return [worker for tier in self._workers.values() for worker in tier.values()]

    def unused(self) -> list[Unused]:
        """Workers that answer and are not used."""
        return list(self._unused.values())

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

    async def _follow_target(self, tier: str, target: str) -> None:
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
                        watches[address] = group.create_task(self._follow_worker(tier, address))
                for address in set(watches) - set(addresses):
                    watches.pop(address).cancel()
                    self._complained.pop((tier, address), None)
                await asyncio.sleep(self._resolve_every)

    async def _follow_worker(self, tier: str, target: str) -> None:
        """Watch one address for ever; reconnects with a growing, bounded pause."""
        backoff = _FIRST_BACKOFF
        told = False  # once per absence
        while True:
            watched = False
            try:
                async for _ in self._watch(tier, target):
                    watched = True
            except TimeoutError:
                log.warning("%s %s is silent", tier, target)
            except grpc.aio.AioRpcError as error:
                if watched or not told:
                    log.info("%s %s is not there: %s", tier, target, error.code().name)
                told = True
            if watched:
                told = False
            backoff = _FIRST_BACKOFF if watched else min(backoff * 2, _LAST_BACKOFF)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    async def _watch(self, tier: str, target: str) -> AsyncIterator[None]:
        """A worker's states, from its first word to its last."""
        request = worker_pb2.WatchRequest(
            interval_ms=max(50, int(self._silence * 1000 / 5)), prefix_key=self._prefix_key
        )
        async with self._channels.channel(target) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            call = stub.Watch(request)
            messages = aiter(call)
            worker: Worker | None = None
            pause = _FIRST_BACKOFF
            try:
                while True:
                    async with patience(self._silence):
                        state = await anext(messages, None)
                    if state is None:
                        return
                    changes = _apart(state)
                    worker = self._take(tier, target, worker, state)
                    if worker is not None and changes is not None and not _learn(tier, worker, changes):
                        # A new stream begins with all there is. The worker itself is as usable as it was.
                        call.cancel()
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, _LAST_BACKOFF)
                        call = stub.Watch(request)
                        messages = aiter(call)
                    yield
            except TimeoutError:
                for silent in (worker, self._left.pop((tier, target), None)):
                    if silent is not None:
                        silent.silent()
                raise
            finally:
                call.cancel()
                self._drop(tier, target, worker)

    def _take(self, tier: str, target: str, worker: Worker | None, state: worker_pb2.WatchResponse) -> Worker | None:
        """Account for a state message; returns the worker, None if it cannot be used."""
        if worker is None or worker.state.incarnation != state.incarnation:
            self._drop(tier, target, worker)
            if (refused := refusal(tier, state, self._models)) is not None:
                self._refuse(Unused(target, tier, state, refused))
                return None
            model = self._models.of(state.model)
            assert model is not None, "a worker of no model is refused"
            worker = self._returned(tier, target, state) or Worker(target, model.name, state)
            there = self._workers[tier].get(target)
            if there is not None and there.state.incarnation != state.incarnation:
                del self._workers[tier][target]  # of the process before, whose watch has yet to end
        if target not in self._workers[tier]:
            self._workers[tier][target] = worker
            log.info("%s %s is there", tier, target, extra={"fingerprint": state.model.fingerprint})
            self._announce()
        other = worker.state.draining != state.draining or worker.state.model != state.model
        worker.take(state)
        if other:
            self._announce()
        return worker

    def _returned(self, tier: str, target: str, state: worker_pb2.WatchResponse) -> Worker | None:
        """The worker that left the view while calls ran there, if it is the same process."""
        left = self._left.get((tier, target))
        if left is None or left.state.incarnation != state.incarnation:
            return None
        return self._left.pop((tier, target))

    def _refuse(self, unused: Unused) -> None:
        """Keep a worker for those who ask why it is not used; the log is told once of each process and reason."""
        key = unused.tier, unused.target
        self._unused[key] = unused
        complaint = unused.state.incarnation, unused.refusal.unfit
        if self._complained.get(key) != complaint:
            self._complained[key] = complaint
            log.error("%s %s is not used: %s", unused.tier, unused.target, unused.refusal.message)
        self._count()

    def _drop(self, tier: str, target: str, worker: Worker | None) -> None:
        """A watch ends; its worker, if it had one, leaves the view.

        Two targets may mean one address. Each has its watch and its worker then, of which one is in the view; the
        other's next word puts it there in its place.
        """
        if self._unused.pop((tier, target), None) is not None:
            self._count()
        if worker is None:
            return
        PREFIX_BLOCKS.labels(tier).dec(len(worker.prefixes))
        worker.prefixes.forget()
        if self._workers[tier].get(target) is worker:
            del self._workers[tier][target]
            self._announce()
        self._left = {key: left for key, left in self._left.items() if left.busy and not left.hung}
        if worker.busy and not worker.hung:
            self._left[tier, target] = worker

    def _announce(self) -> None:
        self._count()
        self.version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _count(self) -> None:
        for tier, workers in self._workers.items():
            WORKERS.labels(tier).set(len(workers))
            for model in self._models:
                MODEL_WORKERS.labels(tier, model.name).set(sum(w.model == model.name for w in workers.values()))
            for unfit in Unfit:
                unused = sum(u.tier == tier and u.refusal.unfit is unfit for u in self._unused.values())
                UNUSED_WORKERS.labels(tier, unfit).set(unused)


def _apart(state: worker_pb2.WatchResponse) -> worker_pb2.PrefixChanges | None:
    """Take what a state tells of prefixes out of it: states are kept, and shown to people."""
    if not state.HasField("prefixes"):
        return None
    changes = worker_pb2.PrefixChanges()
    changes.CopyFrom(state.prefixes)
    state.ClearField("prefixes")
    return changes


def _learn(tier: str, worker: Worker, changes: worker_pb2.PrefixChanges) -> bool:
    """Account for what a worker told of its prefix cache; False: a message is missing, and nothing is known now."""
    before = len(worker.prefixes)
    try:
        worker.prefixes.take(changes, worker.state.capacity.kv_tokens // max(1, changes.block_tokens))
    except Gap as gap:
        worker.prefixes.forget()
        PREFIX_RESYNCS.inc()
        log.warning("what %s %s tells of its prefix cache has a gap, it is asked anew: %s", tier, worker.target, gap)
        return False
    finally:
        PREFIX_BLOCKS.labels(tier).inc(len(worker.prefixes) - before)
    return True
