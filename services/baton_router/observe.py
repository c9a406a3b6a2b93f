"""`baton.internal.v1.Observe`: recent requests and the state of the mesh, for operators."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.internal.v1 import observe_pb2, observe_pb2_grpc
from baton.rpc.errors import NotFound
from baton.rpc.service import Runtime
from baton_router.inference import InferenceServicer
from baton_router.pulse import Percentiles
from baton_router.record import Record
from baton_router.workers import WorkerView

Context = grpc.aio.ServicerContext[Any, Any]

_DEFAULT_LIMIT = 20
_MIN_INTERVAL_MS = 100


class ObserveServicer(observe_pb2_grpc.ObserveServicer):
    """Reads what the router keeps; changes nothing."""

    def __init__(self, inference: InferenceServicer, view: WorkerView, runtime: Runtime) -> None:
        self._inference = inference
        self._view = view
        self._runtime = runtime

    async def GetRecord(self, request: observe_pb2.GetRecordRequest, context: Context) -> observe_pb2.GetRecordResponse:
        """One recent request."""
        record = self._inference.records.get(request.request_id)
        if record is None:
            raise NotFound(f"request {request.request_id} is not among the latest")
        return observe_pb2.GetRecordResponse(record=_record(record))

    async def ListRecords(
        self, request: observe_pb2.ListRecordsRequest, context: Context
    ) -> observe_pb2.ListRecordsResponse:
        """Recent requests."""
        latest = itertools.islice(self._inference.records.latest(), request.limit or _DEFAULT_LIMIT)
        return observe_pb2.ListRecordsResponse(records=[_record(record) for record in latest])

    async def WatchMesh(
        self, request: observe_pb2.WatchMeshRequest, context: Context
    ) -> AsyncIterator[observe_pb2.WatchMeshResponse]:
        """The state now, then once per interval."""
        interval = max(_MIN_INTERVAL_MS, request.interval_ms or 1000) / 1000
        while not self._runtime.draining.is_set():
            yield self._state()
            try:
                async with asyncio.timeout(interval):
                    await self._runtime.draining.wait()
            except TimeoutError:
                continue

    def _state(self) -> observe_pb2.WatchMeshResponse:
        window = self._inference.pulse.window()
        state = observe_pb2.WatchMeshResponse(
            in_flight=self._inference.in_flight,
            outcomes=window.outcomes,
            cache_hits=window.cache_hits,
            coalesced=window.coalesced,
            tokens_per_second=window.tokens_per_second,
            time_to_first_token=_percentiles(window.time_to_first_token),
            inter_token=_percentiles(window.inter_token),
            workers=[
                observe_pb2.WorkerView(
                    target=worker.target,
                    state=worker.state,
                    in_flight=len(worker.in_flight),
                    model=worker.model,
                    prefix_blocks=len(worker.prefixes),
                )
                for worker in self._view.workers()
            ],
            unused=[
                observe_pb2.UnusedWorker(
                    target=unused.target,
                    reason=unused.refusal.unfit,
                    message=unused.refusal.message,
                    state=unused.state,
                )
                for unused in self._view.unused()
            ],
        )
        state.window.FromNanoseconds(int(window.seconds * 1e9))
        for (hop, kind), duration in sorted(window.ledger.items()):
            state.ledger.add(hop=hop, kind=kind).duration.FromNanoseconds(duration)
        return state


def _record(record: Record) -> observe_pb2.RequestRecord:
    message = observe_pb2.RequestRecord(
        request_id=record.request_id, method=record.method, outcome=record.outcome, summary=record.summary
    )
    message.received.FromNanoseconds(record.started_ns)
    return message


def _percentiles(values: Percentiles | None) -> observe_pb2.Percentiles | None:
    if values is None:
        return None
    message = observe_pb2.Percentiles()
    message.p50.FromNanoseconds(values.p50)
    message.p90.FromNanoseconds(values.p90)
    message.p99.FromNanoseconds(values.p99)
    return message
