"""What a Redis URL says. Pure.

    redis://[user:password@]host[:port][/db]                      one server
    redis+sentinel://[user:password@]host[:port],.../name[/db]    the master that sentinels name
    redis+cluster://[user:password@]host[:port],...               a cluster
    unix://[user:password@]/path[?db=1]                           one server, on a socket of this machine

rediss for redis: over TLS. User and password are those of Redis, percent-encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379


class Mode(Enum):
    """How Redis is run."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: host and port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A Redis URL, taken apart."""

    mode: Mode
    addresses: tuple[Address, ...]
    """Of the server, the sentinels, or some servers of the cluster."""
    tls: bool = False
    service: str = ""
    """What sentinels call the master."""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)


_SCHEMES: Final = {
    "redis": (Mode.SINGLE, False),
    "rediss": (Mode.SINGLE, True),
    "redis+sentinel": (Mode.SENTINEL, False),
    "rediss+sentinel": (Mode.SENTINEL, True),
    "redis+cluster": (Mode.CLUSTER, False),
    "rediss+cluster": (Mode.CLUSTER, True),
}


def parse(url: str) -> RedisUrl:
    """Take a URL apart.

    Raises:
        ValueError: it is none of those above. The text repeats nothing of it.
    """
    try:
        parts = urlsplit(url)
        options = parse_qs(parts.query, strict_parsing=True, keep_blank_values=True) if parts.query else {}
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.fragment:
        raise ValueError("has a '#': write it as %23 in a password")
    if options.keys() - {"db"}:
        raise ValueError("takes no option but db: TLS and time-outs are flags")
    user, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.scheme == "unix":
        if hosts or not parts.path:
            raise ValueError("must name a socket: unix:///path")
        mode, tls, service = Mode.SINGLE, False, ""
        addresses: tuple[Address, ...] = (Address(path=unquote(parts.path)),)
        path = []
    elif parts.scheme in _SCHEMES:
        mode, tls = _SCHEMES[parts.scheme]
        port = _SENTINEL_PORT if mode is Mode.SENTINEL else _PORT
        addresses = tuple(_address(host, port) for host in hosts.split(","))
        if mode is Mode.SINGLE and len(addresses) > 1:
            raise ValueError("names several hosts: only +sentinel and +cluster take them")
        service = path.pop(0) if mode is Mode.SENTINEL and path else ""
        if mode is Mode.SENTINEL and not service:
            raise ValueError("must name the master after the hosts: /mymaster")
    else:
        raise ValueError("must be a redis://, rediss://, unix://, or a redis+sentinel:// or redis+cluster:// URL")
    return RedisUrl(
        mode=mode,
        addresses=addresses,
        tls=tls,
        service=service,
        db=_db([*path, *options.get("db", [])], mode),
        username=unquote(username),
        password=unquote(password),
    )


def _address(text: str, default_port: int) -> Address:
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        host, port = text, str(default_port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("must name hosts, each with a port from 1 to 65535 or without")
    return Address(host=unquote(host), port=int(port))


def _db(given: list[str], mode: Mode) -> int:
    if not given:
        return 0
    if len(given) > 1 or not given[0].isascii() or not given[0].isdigit():
        raise ValueError("must name its database by one number")
    if mode is Mode.CLUSTER and int(given[0]):
        raise ValueError("must not name a database: a cluster has only one")
    return int(given[0])
