"""The mesh on this machine: starts the services in order, notices the first that ends, stops them in order."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from baton import __version__
from baton.cli import connection
from baton.cli.guarding import Guard
from baton.cli.mesh import Mesh
from baton.cli.plan import SERVICES, Plan
from baton.cli.service_process import OnLog, ServiceDied, ServiceProcess
from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2

if TYPE_CHECKING:
    from baton.cli.redis_server import EmbeddedRedis

Relay = Callable[[str, str], Awaitable[str]]

_MESH_NAME: Final = "baton-mesh"
_MARGIN: Final = 5.0
"""Seconds a service gets on top of its drain before it is killed."""


class StartTimeout(Exception):
    """A service neither served nor ended in time."""


class Stack:
    """All services of a plan.

    Args:
        plan: what to start.
        log_directory: where the services' output goes; None: the last lines are kept in memory.
        start_timeout: seconds everything may take until it serves.
        on_log: called with every JSON log line of every service.
        relay: gives the address callers get for a service (or for "redis", its URL); default: its own.
    """

    def __init__(
        self,
        plan: Plan,
        log_directory: Path | None,
        start_timeout: float,
        on_log: OnLog,
        relay: Relay | None = None,
    ) -> None:
        self._relay = relay
        self._plan = plan
        self._log_directory = log_directory
        self._start_timeout = start_timeout
        self._on_log = on_log
        self._directory = tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True)
        self._guard = Guard(plan.drain_seconds + _MARGIN, Path(self._directory.name))
        self._redis: asyncio.Task[EmbeddedRedis] | None = None
        self._ca, self._tls = _certificates(Path(self._directory.name)) if plan.tls else ("", {})
        self.router = self._service("router", "router", [])
        self.cache = self._service("cache", "cache", [])
        self.workers = [
            self._service(name, service, plan.worker_arguments(service)) for name, service in plan.worker_names()
        ]

    @property
    def services(self) -> list[ServiceProcess]:
        """All services, in the order a person reads them."""
        return [self.router, self.cache, *self.workers]

    async def start(self) -> Mesh:
        """Start everything and wait until all of it serves.

        Raises:
            ServiceDied: a service ended before it served, or after, while others were still starting.
            StartTimeout: not within the start timeout.
        """
        try:
            async with asyncio.timeout(self._start_timeout):
                starting = asyncio.create_task(self._start_all())
                watching = asyncio.create_task(self.died())
                try:
                    await asyncio.wait([starting, watching], return_when=asyncio.FIRST_COMPLETED)
                    if starting.done():
                        return starting.result()
                    raise watching.result()
                finally:
                    await _cancelled(starting, watching)
        except TimeoutError:
            late = ", ".join(service.name for service in self.services if service.address is None)
            raise StartTimeout(f"not serving after {self._start_timeout:g} s: {late or 'the router'}") from None

    async def died(self) -> ServiceDied:
        """Wait until the first service ends, whichever it is."""
        while True:
            for service in self.services:
                if service.pid is not None and not service.running:
                    return await service.died()
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Stop everything: whoever calls before who is called, so that running requests can finish."""
        grace = self._plan.drain_seconds + _MARGIN
        tiers = [
            [self.router],
            [worker for worker in self.workers if worker.service == "decode"],
            [worker for worker in self.workers if worker.service == "prefill"],
            [self.cache],
        ]
        for tier in tiers:
            await asyncio.gather(*(self._stop_one(service, grace) for service in tier))
        if self._redis is not None:
            await asyncio.wait([self._redis])
            if self._redis.exception() is None:
                redis = self._redis.result()
                pid = redis.pid
                await asyncio.to_thread(redis.close)
                self._guard.forget(pid)
        await asyncio.to_thread(self._guard.close)
        self._directory.cleanup()

    def kill(self) -> None:
        """End everything at once, without any courtesy."""
        for service in self.services:
            service.kill()
        # The guard gets what is left, Redis for one, when this process ends.

    async def _start_all(self) -> Mesh:
        redis_url = self._plan.redis_url
        if not redis_url:
            # Shielded: a Redis that starts while we are told to stop is still ours to stop.
            self._redis = asyncio.create_task(asyncio.to_thread(_start_redis))
            redis = await asyncio.shield(self._redis)
            self._guard.watch(redis.pid)
            redis_url = redis.url
        # In the environment: anyone can read flags.
        secret = {} if self._plan.has_key_secret(os.environ) else {"BATON_KEY_SECRET": secrets.token_hex(32)}
        self.cache.set_arguments(
            self._plan.cache_arguments(), {"BATON_REDIS_URL": await self._seen("redis", redis_url), **secret}
        )
        behind = [self.cache, *self.workers]
        for service in behind:
            self._guard.watch(await service.start())
        await asyncio.gather(*(service.ready() for service in behind))
        self.router.set_arguments(
            self._plan.router_arguments(
                decode=[await self._seen(w.name, _grpc(w)) for w in self.workers if w.service == "decode"],
                prefill=[await self._seen(w.name, _grpc(w)) for w in self.workers if w.service == "prefill"],
                cache=await self._seen("cache", _grpc(self.cache)),
            )
        )
        self._guard.watch(await self.router.start())
        await self.router.ready()
        await self._model_ready()
        addresses = [service.address for service in self.services]
        return Mesh(
            version=__version__,
            router=_grpc(self.router),
            model=self._plan.served_name,
            redis=_without_user(redis_url),
            pid=os.getpid(),
            services=tuple(address for address in addresses if address is not None),
            ca=self._ca,
        )

    async def _seen(self, name: str, address: str) -> str:
        return address if self._relay is None else await self._relay(name, address)

    async def _model_ready(self) -> None:
        """Wait until the router sees a decode worker: only then does the first request find one."""
        assert self.router.address is not None
        async with grpc.aio.insecure_channel(self.router.address.admin) as channel:
            watch = observe_pb2_grpc.ObserveStub(channel).WatchMesh
            metadata = connection.chosen().admin_metadata
            while True:
                with suppress(grpc.aio.AioRpcError):  # if the router is gone, somebody else notices
                    async for state in watch(observe_pb2.WatchMeshRequest(interval_ms=100), metadata=metadata):
                        if any(worker.state.role == worker_pb2.WORKER_ROLE_DECODE for worker in state.workers):
                            return
                await asyncio.sleep(0.05)

    async def _stop_one(self, service: ServiceProcess, grace: float) -> None:
        await service.stop(grace)
        if service.pid is not None:
            self._guard.forget(service.pid)

    def _service(self, name: str, service: str, arguments: list[str]) -> ServiceProcess:
        return ServiceProcess(
            name,
            service,
            arguments,
            environment={**self._tls.get(service, {}), **self._plan.environment.get(service, {})},
            directory=Path(self._directory.name),
            log_directory=self._log_directory,
            on_log=self._on_log,
        )


def _certificates(directory: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """A CA's file, and the settings of each service for TLS with its own certificate."""
    from baton.cli.throwaway_ca import ThrowawayCa  # only who wants TLS needs it

    ca = ThrowawayCa(directory)
    settings = {}
    for service in SERVICES:
        names = [] if service == "router" else [_MESH_NAME]
        own = ca.issue(service, ["localhost", *names], ["127.0.0.1", "::1"])
        settings[service] = {
            "BATON_TLS_CERT": str(own.cert),
            "BATON_TLS_KEY": str(own.key),
            "BATON_MESH_CA": str(ca.ca),
            "BATON_MESH_TLS_NAME": _MESH_NAME,
        }
        if service != "router":
            settings[service] |= {"BATON_TLS_CLIENT_CA": str(ca.ca), "BATON_TLS_CLIENT_NAMES": _MESH_NAME}
    peer = ca.issue("router-to-mesh", [_MESH_NAME])
    settings["router"] |= {"BATON_MESH_CERT": str(peer.cert), "BATON_MESH_KEY": str(peer.key)}
    return str(ca.ca), settings


def _grpc(service: ServiceProcess) -> str:
    assert service.address is not None
    return service.address.grpc


def _without_user(url: str) -> str:
    """A Redis URL as it may be shown: without user and password."""
    scheme, separator, rest = url.partition("://")
    return scheme + separator + rest.rpartition("@")[2]


def _start_redis() -> EmbeddedRedis:
    from baton.cli.redis_server import EmbeddedRedis  # only who has no Redis of his own needs one

    redis = EmbeddedRedis()
    redis.start()
    return redis


async def _cancelled(*tasks: asyncio.Task[object]) -> None:
    """Cancel tasks and wait until they are over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
