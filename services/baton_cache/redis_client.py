"""Clients of Redis: one server each, a bounded pool, no retries, no waiting beyond the time-out.

redis-py's own defaults fit a program that would rather wait than fail: ten retries with pauses, 5 s time-outs. Its
clients for Sentinel and Cluster ask around inside of a call, one server after another; with 20 ms for all of it they
would never get to the second one when the first is frozen. So who is asked is decided in `servers.py`.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from baton.rpc.service import CannotStart
from baton_cache.redis_url import Address


class TlsConnection(Connection):
    """A connection over TLS.

    redis-py's own makes a context of its own for each connection, which reads all CA certificates there are: 23 ms,
    more than a call may take.
    """

    def __init__(self, *, tls: ssl.SSLContext, **options: Any) -> None:
        self._tls = tls
        super().__init__(**options)

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "ssl": self._tls}


@dataclass(frozen=True, slots=True)
class Credentials:
    """ACL user and password; both empty: none."""

    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How connections are made."""

    timeout: float
    """Seconds for connecting. Answers are bounded by who asks, with `asyncio.timeout`."""
    connections: int
    """Most connections to one server."""
    db: int = 0
    credentials: Credentials = Credentials()
    tls: ssl.SSLContext | None = None

    def client(self, address: Address) -> Redis:
        """A client of one server. It connects when it is used."""
        pool = BlockingConnectionPool(
            connection_class=self._connection_class(address),
            max_connections=self.connections,
            timeout=None,
            # with no name and version to tell, connecting takes no round trip unless there is a password
            **self._connection_arguments(address, protocol=2),
        )
        return Redis.from_pool(pool)

    def connection(self, address: Address) -> AbstractConnection:
        """A connection of its own that speaks RESP3, for messages that the server sends unasked."""
        return self._connection_class(address)(**self._connection_arguments(address, protocol=3))

    def _connection_class(self, address: Address) -> type[AbstractConnection]:
        if address.path:
            return UnixDomainSocketConnection
        return Connection if self.tls is None else TlsConnection

    def _connection_arguments(self, address: Address, protocol: int) -> dict[str, Any]:
        where = {"path": address.path} if address.path else {"host": address.host, "port": address.port}
        over = {"tls": self.tls} if self.tls is not None and not address.path else {}
        return {
            **where,
            **over,
            "db": self.db,
            "username": self.credentials.username or None,
            "password": self.credentials.password or None,
            # In redis-py this is an `asyncio.wait_for`, which on Python 3.11 can swallow the cancellation that ends a
            # call, and then the call waits a second time.
            "socket_timeout": None,
            "socket_connect_timeout": self.timeout,
            "retry": Retry(NoBackoff(), 0),
            "protocol": protocol,
            "driver_info": None,
        }


def tls_context(
    ca_file: Path | None, cert_file: Path | None, key_file: Path | None, check_hostname: bool
) -> ssl.SSLContext:
    """What TLS connections trust, and show.

    Args:
        ca_file: certificates that may have signed the server's; None: those of the system.
        cert_file: our own certificate; None: none.
        key_file: its key; None: it is in the same file.
        check_hostname: whether the server's certificate must be for the host it was reached by.

    Raises:
        CannotStart: a file cannot be used; names the flag.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise CannotStart(f"--redis-ca-file: {_reason(error)}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_hostname
    if cert_file is not None:
        try:
            # An empty password: a key that needs one is refused instead of asked for on the terminal.
            context.load_cert_chain(cert_file, key_file, password="")
        except (OSError, ssl.SSLError) as error:
            raise CannotStart(f"--redis-cert-file, --redis-key-file: {_reason(error)}") from None
    return context


def _reason(error: OSError) -> str:
    return error.strerror or getattr(error, "reason", None) or type(error).__name__
