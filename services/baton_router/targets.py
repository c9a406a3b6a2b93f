"""What a list of targets means now: fixed addresses, and names whose addresses come and go."""

from __future__ import annotations

import asyncio
import socket

_DNS = "dns:///"
_SECONDS = 5.0
"""A name server gets to answer."""


async def resolve_target(target: str) -> list[str]:
    """Addresses of a target. "dns:///name:port" is every address of the name; anything else is itself.

    Raises:
        OSError: the name does not resolve now, or not in time.
    """
    if not target.startswith(_DNS):
        return [target]
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    async with asyncio.timeout(_SECONDS):  # TimeoutError is an OSError
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    addresses = {(family, sockaddr[0]) for family, _, _, _, sockaddr in found}
    return sorted(f"[{ip}]:{port}" if family == socket.AF_INET6 else f"{ip}:{port}" for family, ip in addresses)


def check_target(target: str) -> None:
    """A target has a form that can be connected to.

    Raises:
        ValueError: it has not.
    """
    host, colon, port = target.removeprefix(_DNS).rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{target!r} is neither host:port nor dns:///name:port")
