"""`baton.internal.v1.Worker`: a worker's state as a stream, and what it holds, for debugging."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import grpc

from baton import __version__
from baton.engine.client import EngineClient
from baton.engine.messages import StepReport
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc.errors import InvalidArgument
from baton.rpc.service import Runtime
from baton.worker.calls import Calls
from baton.worker.digests import MAX_KEY_BYTES, MIN_KEY_BYTES
from baton.worker.prefix_feed import PrefixFeed
from baton.worker.protocol import PROTOCOL
from baton.worker.settings import WorkerSettings
from baton.worker.step_meter import StepMeter

_MIN_INTERVAL = 0.05  # seconds between two load messages of one stream


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves Watch and DebugState of one worker."""

    def __init__(
        self,
        role: worker_pb2.WorkerRole.ValueType,
        settings: WorkerSettings,
        engine: EngineClient,
        meter: StepMeter,
        calls: Calls,
        runtime: Runtime,
    ) -> None:
        self._role = role
        self._settings = settings
        self._engine = engine
        self._meter = meter
        self._calls = calls
        self._runtime = runtime
        self._report: StepReport | None = None
        engine.on_report.append(self._on_report)

    def register(self, runtime: Runtime) -> None:
        """Serve other services, and operators."""
        for server in {runtime.server, runtime.admin}:
            worker_pb2_grpc.add_WorkerServicer_to_server(self, server)
        runtime.register("baton.internal.v1.Worker")
        runtime.register_admin("baton.internal.v1.Worker")

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        """The state at once, then whenever it moved, at least every interval, until the worker stops: of
        one that drains, until its calls are over.

        Raises:
            InvalidArgument: the key is too short or too long.
        """
        interval = max(_MIN_INTERVAL, (request.interval_ms or 1000) / 1000)
        silent = 0.0
        last: worker_pb2.WatchResponse | None = None
        with ExitStack() as stack:
            feed = self._feed(request.prefix_key, stack)
            # Who watches is to find out that it hangs while it drains, too. The drain waits for the calls in any
            # case, and cuts this off with those that do not finish.
            while not self._runtime.draining.is_set() or self._calls.ids():
                state = self.state()
                changes = feed.changes() if feed is not None else None
                if state != last or changes is not None or silent >= interval:
                    last, silent = state, 0.0
                    yield _with(state, changes)
                await asyncio.sleep(_MIN_INTERVAL)
                silent += _MIN_INTERVAL
        yield self.state()

    def _feed(self, key: bytes, stack: ExitStack) -> PrefixFeed | None:
        """What tells of the prefix cache, until the stack is left; None: nobody asked."""
        if not key:
            return None
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise InvalidArgument("prefix_key", f"must be {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes, or empty")
        feed = PrefixFeed(self._engine.prefixes, key)
        stack.callback(feed.close)
        return feed

    async def DebugState(
        self, request: worker_pb2.DebugStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DebugStateResponse:
        """Everything the worker holds now."""
        held = await self._engine.inspect()
        return worker_pb2.DebugStateResponse(
            engine_requests=held.requests,
            calls=self._calls.ids(),
            free_slots=held.free_slots,
            total_slots=held.total_slots,
            used_tokens=held.used_tokens,
            capacity_tokens=held.capacity_tokens,
            tasks=len(asyncio.all_tasks()),
            open_files=_open_files(),
            incarnation=self._engine.incarnation,
            steps=held.steps,
            cached_slots=held.kept_slots,
            cached_tokens=held.kept_tokens,
        )

    def state(self) -> worker_pb2.WatchResponse:
        """What Watch sends now."""
        spec = self._engine.spec
        report = self._report
        cost = self._meter.cost()
        return worker_pb2.WatchResponse(
            role=self._role,
            incarnation=self._engine.incarnation,
            version=__version__,
            model=worker_pb2.WorkerModel(
                name=self._settings.served_name(),
                fingerprint=spec.fingerprint,
                tokenizer_digest=spec.tokenizer_digest,
                max_context=self._engine.max_context,
                vocab_size=spec.vocab_size,
                eos_token_ids=spec.eos_token_ids,
                dtype=spec.dtype.value,
                quantization=self._settings.quantization.value,
                exact=self._engine.exact,
            ),
            capacity=worker_pb2.Capacity(kv_tokens=self._engine.capacity_tokens, slots=self._engine.layout.num_slots),
            load=worker_pb2.Load(
                running=report.running if report else 0,
                waiting=report.waiting if report else 0,
                kv_used_tokens=report.used_tokens if report else 0,
                steps=report.step if report else 0,
                waiting_prompt_tokens=report.waiting_prompt_tokens if report else 0,
                step_cost=cost.to_proto() if cost else None,
            ),
            draining=self._runtime.draining.is_set() or self._engine.stalled,
            protocol=PROTOCOL,
        )

    def _on_report(self, report: StepReport) -> None:
        self._report = report


def _with(state: worker_pb2.WatchResponse, changes: worker_pb2.PrefixChanges | None) -> worker_pb2.WatchResponse:
    """A state that tells of changes, too; the state itself stays comparable to the next one."""
    if changes is None:
        return state
    told = worker_pb2.WatchResponse(prefixes=changes)
    told.MergeFrom(state)
    return told


def _open_files() -> int:
    """Open descriptors of this process; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
