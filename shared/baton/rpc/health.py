"""gRPC health whose watchers do not hold a draining service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

_Response = health_pb2.HealthCheckResponse


class Health(health.aio.HealthServicer):  # type: ignore[misc,name-defined]
    """As the library's, but a Watch ends with the news that the service is draining.

    The library's own never ends, so that a server with a watcher would always wait its whole drain time.

    Args:
        draining: set before the services are set to NOT_SERVING for good.
    """

    def __init__(self, draining: asyncio.Event) -> None:
        super().__init__()
        self._draining = draining
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()

    async def set(self, service: str, status: Any) -> None:
        """Set the status of a service; "" is the process."""
        await super().set(service, status)
        self._statuses[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        """The statuses of all services."""
        return health_pb2.HealthListResponse(
            statuses={service: _Response(status=status) for service, status in self._statuses.items()}
        )

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Stream the status of a service: now, and whenever it changes."""
        told = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Response.SERVICE_UNKNOWN)
            if status != told:
                told = status
                yield _Response(status=status)
            if self._draining.is_set() and status != _Response.SERVING:
                return
            await changed.wait()
