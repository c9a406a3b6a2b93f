"""OpenTelemetry's conventions for gRPC spans, of version 1.44: which statuses are errors, and the name of a server.

https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import grpc

SYSTEM: Final = "rpc.system.name"
METHOD: Final = "rpc.method"
STATUS_CODE: Final = "rpc.response.status_code"
ERROR_TYPE: Final = "error.type"

SERVER_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""What is an error of the one who serves; the other statuses are answers. To a caller all but OK are errors."""


@lru_cache(maxsize=256)
def server_attributes(target: str) -> dict[str, str | int]:
    """`server.address` and `server.port` of a gRPC target, which must not be changed.

    A target that names no single host ("ipv4:10.0.0.1:4000,10.0.0.2:4000", "zk://...") is the address as it stands.
    """
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        return {"server.address": path.removeprefix("//") if path.startswith("///") else path}
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        endpoint = rest.rpartition("/")[2]  # dns://authority/host:port
    elif "/" in target:
        return {"server.address": target}
    else:
        endpoint = target
    host, port = _host_and_port(endpoint)
    if not host or "," in endpoint:
        return {"server.address": target}
    return {"server.address": host} if port is None else {"server.address": host, "server.port": port}


def _host_and_port(endpoint: str) -> tuple[str, int | None]:
    """ "[::1]:4000" as "::1" and 4000; without a port None."""
    host, colon, port = endpoint.rpartition(":")
    if colon and port.isdecimal() and (":" not in host or host.startswith("[")):
        return host.strip("[]"), int(port)
    return endpoint.strip("[]"), None
