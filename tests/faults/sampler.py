"""Watches what workers hold while a load runs: when a cancelled request was gone from all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from tests.faults.bed import Bed
from tests.faults.history import History

EVERY = 0.03  # seconds between two looks at a worker
_ANSWER = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """What one worker said.

    Attributes:
        asked_at: what it said was true after this.
        told_at: and before this.
        ids: of clients' requests that it holds, in its engine or in a call.
    """

    asked_at: float
    told_at: float
    ids: frozenset[str]


@dataclass(slots=True)
class Sampler:
    """Looks at all workers of a mesh."""

    bed: Bed
    looks: dict[str, list[Look]] = field(default_factory=dict)

    async def watch(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name in self.bed.topology.services:
                if name.startswith(("prefill", "decode")):
                    group.create_task(self._watch(name))

    async def _watch(self, name: str) -> None:
        looks = self.looks.setdefault(name, [])
        async with grpc.aio.insecure_channel(self.bed.service(name).admin) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                asked = time.monotonic()
                try:
                    state = await stub.DebugState(worker_pb2.DebugStateRequest(), timeout=_ANSWER)
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(EVERY)
                    continue
                # Workers' ids are the client's and a random end.
                ids = frozenset(held.partition(".")[0] for held in (*state.engine_requests, *state.calls))
                looks.append(Look(asked, time.monotonic(), ids))
                await asyncio.sleep(max(0.0, asked + EVERY - time.monotonic()))

    def freed_after(self, history: History, *, by_deadline: bool = False) -> Iterator[float]:
        """Seconds from each cancel, or deadline, until every worker that held the request said it no longer does.

        A bound from above: a look later than the truth, and the time the worker took to answer.
        """
        for asked in history.requests:
            for attempt in asked.attempts:
                since = attempt.deadline_at if by_deadline else attempt.cancelled_at
                if since is None:
                    continue
                gone = [
                    at - since
                    for looks in self.looks.values()
                    if (at := _gone(looks, attempt.request_id, since)) is not None
                ]
                if gone:
                    yield max(gone)

    def orphans_after(self, history: History, since: float) -> Iterator[float]:
        """The same for calls that ended UNAVAILABLE after something happened, from then on."""
        for asked in history.requests:
            for attempt in asked.attempts:
                if attempt.asked_at > since or attempt.ended is None or attempt.ended.code != "UNAVAILABLE":
                    continue
                gone = [_gone(looks, attempt.request_id, since) for looks in self.looks.values()]
                if held := [at - since for at in gone if at is not None]:
                    yield max(held)


def _gone(looks: list[Look], request_id: str, since: float) -> float | None:
    """When a worker first said that it does not hold a request any more; None: it never held it after the cancel."""
    held = False
    for look in looks:
        if look.told_at < since:
            continue
        if request_id in look.ids:
            held = True
        elif look.asked_at >= since and held:
            return look.told_at
    return float("inf") if held else None
