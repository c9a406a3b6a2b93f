"""Ask services how they are: gRPC health, the models of a router, the load of a worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cli import connection
from baton.cli.mesh import Mesh, Process
from baton.client import BatonRpcError, ModelInfo
from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.rpc.metadata_channel import MetadataChannel

_TIMEOUT: Final = 3.0
"""Seconds a service gets to answer."""
_WORKERS: Final = ("prefill", "decode")
TIERS: Final = {worker_pb2.WORKER_ROLE_PREFILL: "prefill", worker_pb2.WORKER_ROLE_DECODE: "decode"}
_UNREACHABLE: Final = "unreachable"


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What one service said."""

    name: str
    address: str
    health: str
    """"serving", "not serving", "unreachable", or a status code's name."""
    load: worker_pb2.WatchResponse | None = None
    """Of a worker that answered; None for the others."""


@dataclass(frozen=True, slots=True)
class MeshState:
    """What a router and the services behind it said."""

    target: str
    router: ServiceState
    models: list[ModelInfo] = field(default_factory=list)
    services: list[ServiceState] = field(default_factory=list)
    """The known services, the router first; empty when no ready file tells where they are."""
    view: observe_pb2.WatchMeshResponse | None = None
    """The workers as the router sees them; None when its operators' port is not known, or does not answer."""

    @property
    def serving(self) -> bool:
        """Whether the router serves."""
        return self.router.health == "serving"

    def workers(self, model: str, tier: str) -> int:
        """Workers of a model that the router uses."""
        seen = self.view.workers if self.view is not None else ()
        return sum(worker.model == model and TIERS.get(worker.state.role) == tier for worker in seen)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "target": self.target,
            "serving": self.serving,
            "models": [
                {
                    "name": model.name,
                    "ready": model.ready,
                    "max_context": model.max_context,
                    "vocab_size": model.vocab_size,
                    "dtype": model.dtype,
                    "chat": model.chat,
                    "fingerprint": model.fingerprint,
                    "workers": None if self.view is None else {t: self.workers(model.name, t) for t in TIERS.values()},
                }
                for model in self.models
            ],
            "unused_workers": [
                {"target": unused.target, "reason": unused.reason, "message": unused.message}
                for unused in (self.view.unused if self.view is not None else ())
            ],
            "services": [_service_json(state) for state in self.services or [self.router]],
        }


async def probe(target: str, mesh: Mesh | None) -> MeshState:
    """Ask the router at `target`, and every service of `mesh`, all at once. Never raises for a service's silence."""
    async with asyncio.TaskGroup() as group:
        router = group.create_task(_router(target))
        models = group.create_task(_models(target))
        seeing = group.create_task(_view(mesh))
        others = [
            group.create_task(_service(process))
            for process in (mesh.services if mesh else ())
            if process.service != "router"
        ]
    services = [router.result(), *(other.result() for other in others)] if mesh else []
    return MeshState(target, router.result(), models.result(), services, seeing.result())


async def _router(target: str) -> ServiceState:
    """As its clients see it."""
    async with connection.channel(target) as channel:
        return ServiceState("router", target, await _health(channel))


async def _service(process: Process) -> ServiceState:
    """As operators see it."""
    metadata = connection.chosen().admin_metadata
    async with grpc.aio.insecure_channel(process.admin) as bare:
        channel = MetadataChannel(bare, lambda: metadata)
        health = await _health(channel)
        load = await _load(channel) if process.service in _WORKERS and health != _UNREACHABLE else None
        return ServiceState(process.name, process.grpc, health, load)


async def _health(channel: grpc.aio.Channel) -> str:
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT)
    except grpc.aio.AioRpcError as error:
        silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return _UNREACHABLE if silent else error.code().name.lower()
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name.lower().replace("_", " ")


async def _load(channel: grpc.aio.Channel) -> worker_pb2.WatchResponse | None:
    call = worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest(), timeout=_TIMEOUT)
    try:
        async for state in call:
            return state
    except grpc.aio.AioRpcError:
        return None
    finally:
        call.cancel()
    return None


async def _view(mesh: Mesh | None) -> observe_pb2.WatchMeshResponse | None:
    """The workers as the router of a mesh sees them."""
    router = next((process for process in mesh.services if process.service == "router"), None) if mesh else None
    if router is None or not router.admin:
        return None
    metadata = connection.chosen().admin_metadata
    async with grpc.aio.insecure_channel(router.admin) as bare:
        stub = observe_pb2_grpc.ObserveStub(MetadataChannel(bare, lambda: metadata))
        call = stub.WatchMesh(observe_pb2.WatchMeshRequest(), timeout=_TIMEOUT)
        try:
            async for state in call:
                return state
        except grpc.aio.AioRpcError:
            return None
        finally:
            call.cancel()
    return None


async def _models(target: str) -> list[ModelInfo]:
    async with connection.async_client(target, _TIMEOUT) as client:
        try:
            return await client.models()
        except BatonRpcError:
            return []


def _service_json(state: ServiceState) -> dict[str, Any]:
    values: dict[str, Any] = {"name": state.name, "address": state.address, "health": state.health}
    if state.load is not None:
        values["load"] = {
            "running": state.load.load.running,
            "waiting": state.load.load.waiting,
            "kv_used_tokens": state.load.load.kv_used_tokens,
            "kv_tokens": state.load.capacity.kv_tokens,
            "slots": state.load.capacity.slots,
            "steps": state.load.load.steps,
            "draining": state.load.draining,
            "version": state.load.version,
            "protocol": state.load.protocol,
            "model": state.load.model.name,
            "incarnation": state.load.incarnation,
        }
    return values
