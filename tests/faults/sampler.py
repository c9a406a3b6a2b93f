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

    def freed_after(self, history: History) -> Iterator[float]:
        """Seconds from each cancel of an accepted request until every worker that held it said it no longer does.

        A bound from above: a look later than the truth, and the time the worker took to answer.
        """
        for asked in history.requests:
            for attempt in asked.attempts:
                if attempt.cancelled_at is None:
                    continue
                gone = [
                    at - attempt.cancelled_at
                    for looks in self.looks.values()
                    if (at := _gone(looks, attempt.request_id, attempt.cancelled_at)) is not None
                ]
                if gone:
                    yield max(gone)


def _gone(looks: list[Look], request_id: str, cancelled_at: float) -> float | None:
    """When a worker first said that it does not hold a request any more; None: it never held it after the cancel."""
    held = False
    for look in looks:
        if look.told_at < cancelled_at:
            continue
        if request_id in look.ids:
            held = True
        elif look.asked_at >= cancelled_at and held:
            return look.told_at
    return float("inf") if held else None
