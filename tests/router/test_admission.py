"""Admission through a real router: who waits, who is refused and how, and that every way out frees a place."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from baton.internal.v1 import worker_pb2
from baton.rpc.caller import Caller
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker

TENANTS = """
[default]
max_share = 1.0

[tenants.limited]
class = "bronze"
max_concurrency = 1
"""


@pytest.fixture
def caller(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose calls are received now."""
    tenant = [""]
    monkeypatch.setattr("baton_router.inference.current_caller", lambda: Caller(tenant=tenant[0]))
    return tenant


def request(tokens: int = 4, *, priority: int = 0) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        text="fox", sampling=sampling_pb2.SamplingParams(max_tokens=tokens, temperature=1), priority=priority
    )


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    kinds = (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo, error_details_pb2.QuotaFailure)
    return {kind.__name__: box for packed in status.details for kind in kinds for box in [kind()] if packed.Unpack(box)}


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Mesh:
    """A router before one worker that answers when told to."""

    def __init__(self, router: Router, worker: ScriptedWorker) -> None:
        self.router = router
        self.worker = worker
        self._tasks: list[asyncio.Task[list[inference_pb2.StreamGenerateResponse]]] = []

    def ask(
        self, tokens: int = 4, *, priority: int = 0, timeout: float | None = None
    ) -> asyncio.Task[list[inference_pb2.StreamGenerateResponse]]:
        async def collect() -> list[inference_pb2.StreamGenerateResponse]:
            call = self.router.stub.StreamGenerate(request(tokens, priority=priority), timeout=timeout)
            return [message async for message in call]

        self._tasks.append(asyncio.create_task(collect()))
        return self._tasks[-1]

    async def waiting(self, count: int) -> None:
        await eventually(lambda: metric("baton_admission_queue_requests") == count)

    async def end(self) -> None:
        self.worker.gate.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.waiting(0)
        await eventually(lambda: metric("baton_admission_places") == 0)


async def a_mesh(stack: AsyncExitStack, model: Path, slots: int = 1, **settings: object) -> Mesh:
    """With a place more than slots: one request may wait at the worker."""

    def change(worker: ScriptedWorker) -> None:
        worker.gate.clear()
        worker.state.capacity.slots = slots

    worker = await stack.enter_async_context(ScriptedWorker.running(model, change=change))
    router = await stack.enter_async_context(running_router(model, decode_targets=worker.address, **settings))
    mesh = Mesh(router, worker)
    stack.push_async_callback(mesh.end)
    return mesh


async def test_who_waits_is_served_by_priority_then_in_order(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model)
        held = [mesh.ask(), mesh.ask()]
        await eventually(lambda: mesh.worker.live == 2)
        asked = {}
        for tokens, priority in ((5, 0), (6, 0), (7, 50), (8, -50)):
            asked[tokens] = mesh.ask(tokens, priority=priority)
            await mesh.waiting(len(asked))
        assert metric("baton_admission_queue_tokens") > sum(asked)
        mesh.worker.gate.set()
        answers = await asyncio.gather(*held, *asked.values())
        order = [request.sampling.max_tokens for request in mesh.worker.requests]
        assert order == [4, 4, 7, 5, 6, 8]
        ledger = answers[-1][-1].summary.ledger
        for partition in (ledger.total, ledger.first_token):
            queued = {(e.hop, e.kind): e.duration.ToNanoseconds() for e in partition.entries}
            assert queued[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_QUEUE] > 1_000_000
            assert sum(queued.values()) + partition.residual.ToNanoseconds() == partition.total.ToNanoseconds()


async def test_full_queue_refuses_with_a_delay_and_before_anything_else(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model, max_queue_requests=1)
        refused = metric("baton_admission_refused_total", reason="queue_full", tenant_class="default")
        mesh.ask(), mesh.ask()
        await eventually(lambda: mesh.worker.live == 2)
        mesh.ask()
        await mesh.waiting(1)
        call = mesh.router.stub.StreamGenerate(request())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [message async for message in call]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not await call.initial_metadata(), "gRPC itself may retry a call that began with its status"
        found = details(caught.value)
        assert isinstance(info := found["ErrorInfo"], error_details_pb2.ErrorInfo)
        assert info.reason == "OVERLOADED"
        assert isinstance(retry := found["RetryInfo"], error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToNanoseconds() >= 100_000_000
        assert metric("baton_admission_refused_total", reason="queue_full", tenant_class="default") == refused + 1


async def test_every_way_out_of_the_queue(router_model: Path) -> None:
    """Cancelled, past its deadline, and waiting for too long: nobody is served who is not there any more."""
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model, max_queue_seconds=0.8, deadline_margin_seconds=0.6)
        mesh.ask(), mesh.ask()
        await eventually(lambda: mesh.worker.live == 2)
        cancelled, expired, too_long = mesh.ask(5), mesh.ask(6, timeout=0.6), mesh.ask(7)
        await mesh.waiting(3)
        cancelled.cancel()
        await mesh.waiting(2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await expired
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(info := details(caught.value)["ErrorInfo"], error_details_pb2.ErrorInfo)
        assert info.reason == "DEADLINE_EXCEEDED", "the router's own status, not gRPC's"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await too_long
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await mesh.waiting(0)
        mesh.worker.gate.set()
        await mesh.ask(8)
        assert sorted(request.sampling.max_tokens for request in mesh.worker.requests) == [4, 4, 8]


async def test_a_request_that_leaves_a_worker_gives_its_place_up(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model)
        first, _ = mesh.ask(), mesh.ask()
        await eventually(lambda: mesh.worker.live == 2)
        mesh.ask(9)
        await mesh.waiting(1)
        first.cancel()
        await eventually(lambda: [r.sampling.max_tokens for r in mesh.worker.requests] == [4, 4, 9])


async def test_hopeless_deadline(router_model: Path) -> None:
    """The worker says what its steps take, and that many prompts wait there."""
    cost = worker_pb2.StepCost(prefill_seconds=0.01, seconds_per_token=0.01, step_tokens=256)
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model, slots=4)
        mesh.worker.state.load.step_cost.CopyFrom(cost)
        mesh.worker.state.load.waiting_prompt_tokens = 1000
        mesh.ask()
        await eventually(lambda: mesh.worker.live == 1)
        await asyncio.sleep(0.1)  # the router has heard of it
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.ask(timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(info := details(caught.value)["ErrorInfo"], error_details_pb2.ErrorInfo)
        assert info.reason == "DEADLINE_UNREACHABLE"
        patient = mesh.ask(timeout=60)
        await eventually(lambda: mesh.worker.live == 2)
        mesh.worker.gate.set()
        await patient


async def test_limits_of_a_tenant(router_model: Path, tmp_path: Path, caller: list[str]) -> None:
    (tmp_path / "tenants.toml").write_text(TENANTS)
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(
            stack, router_model, slots=4, tenants_file=tmp_path / "tenants.toml", tenants_reload_seconds=0.05
        )
        caller[0] = "limited"
        mesh.ask()
        await eventually(lambda: mesh.worker.live == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.ask()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(caught.value)
        assert isinstance(info := found["ErrorInfo"], error_details_pb2.ErrorInfo)
        assert info.reason == "QUOTA_EXCEEDED"
        assert isinstance(failure := found["QuotaFailure"], error_details_pb2.QuotaFailure)
        assert failure.violations[0].subject == "tenant:limited"
        assert metric("baton_admission_refused_total", reason="max_concurrency", tenant_class="bronze") >= 1
        caller[0] = "another"
        mesh.ask()
        await eventually(lambda: mesh.worker.live == 2)
        (tmp_path / "tenants.toml").write_text(TENANTS.replace("max_concurrency = 1", "max_concurrency = 20"))
        caller[0] = "limited"
        await asyncio.sleep(0.3)
        mesh.ask()
        await eventually(lambda: mesh.worker.live == 3)


async def test_tenants_share_the_places(router_model: Path, tmp_path: Path, caller: list[str]) -> None:
    """One with many requests, of the highest priority, and one with few: they take turns."""
    (tmp_path / "tenants.toml").write_text(TENANTS)
    async with AsyncExitStack() as stack:
        mesh = await a_mesh(stack, router_model, tenants_file=tmp_path / "tenants.toml")
        caller[0] = "greedy"
        tasks = [mesh.ask(5, priority=100) for _ in range(10)]
        await mesh.waiting(8)
        caller[0] = "modest"
        tasks += [mesh.ask(6) for _ in range(3)]
        await mesh.waiting(11)
        mesh.worker.gate.set()
        await asyncio.gather(*tasks)
        order = [request.sampling.max_tokens for request in mesh.worker.requests]
        assert order[2:8].count(6) == 3


async def test_no_worker_is_told_at_once(router_model: Path) -> None:
    """Nothing to wait for: the queue does not hide that."""
    async with running_router(router_model, decode_targets="127.0.0.1:1", reattach_seconds=0.1) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [message async for message in router.stub.StreamGenerate(request())]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
