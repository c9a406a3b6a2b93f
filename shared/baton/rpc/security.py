"""The security of a service, put together from its settings: gates, certificates, and how it calls others."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

from baton.rpc.access import Who
from baton.rpc.api_keys import usable_tenant
from baton.rpc.caller import Caller
from baton.rpc.cannot_start import CannotStart
from baton.rpc.dialer import Dialer
from baton.rpc.gate import Gate
from baton.rpc.mesh_token import Tokens, token_source
from baton.rpc.security_settings import SecuritySettings
from baton.rpc.tls import TlsFiles, server_credentials, watched

log = logging.getLogger(__name__)

_HOW: Final = {
    Who.CLIENT: "--api-keys, --jwt-key-file or --tls-client-ca",
    Who.PEER: "--mesh-token-file or --tls-client-ca",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What a service needs to be called, and to call.

    Attributes:
        gate: of the service's port.
        admin_gate: of the operators' port.
        credentials: of the service's port; None: no TLS.
        dialer: opens channels to other services.
    """

    gate: Gate
    admin_gate: Gate
    credentials: grpc.ServerCredentials | None
    dialer: Dialer


def assemble(settings: SecuritySettings, listen: str, metrics_listen: str) -> Security:
    """Read everything the settings name.

    Args:
        settings: of the service.
        listen: host:port of its port.
        metrics_listen: host:port of its metrics; empty: none.

    Raises:
        CannotStart: something cannot be used, or a port would be open to whoever reaches it.
    """
    peers = token_source("mesh-token", settings.mesh_token.get_secret_value(), settings.mesh_token_file)
    operators = token_source("admin-token", settings.admin_token.get_secret_value(), settings.admin_token_file)
    clients = settings.clients()
    asks = bool(clients) if settings.serves is Who.CLIENT else peers is not None
    certified = settings.tls_client_ca is not None
    gate = Gate(
        anonymous=Who.NOBODY if asks else settings.serves,
        clients=clients,
        peers=peers,
        names=frozenset(name.strip() for name in settings.tls_client_names.split(",") if name.strip()),
        tenant_of=_named_by_certificate if certified and not asks and settings.serves is Who.CLIENT else None,
    )
    _check_reach(settings, listen, metrics_listen, asks=asks or certified)
    if asks and settings.tls_cert is None and not is_loopback(listen):
        log.warning("%s: no TLS: whoever can listen on the network reads the credentials that come here", listen)
    return Security(
        gate=gate,
        admin_gate=Gate(anonymous=Who.OPERATOR if operators is None else Who.NOBODY, peers=peers, operators=operators),
        credentials=_credentials(settings),
        dialer=_dialer(settings, peers),
    )


def _check_reach(settings: SecuritySettings, listen: str, metrics_listen: str, *, asks: bool) -> None:
    if not is_loopback(settings.admin_listen):
        raise CannotStart(f"--admin-listen {settings.admin_listen}: operators come from this machine, by loopback only")
    if not is_loopback(listen) and not asks:
        if not settings.allow_unauthenticated:
            raise CannotStart(
                f"--listen {listen}: whoever reaches this port could use it. Give {_HOW[settings.serves]}, or, where "
                "the network is private, --allow-unauthenticated"
            )
        log.warning("%s is open to whoever reaches it: nobody is asked who they are", listen)
    if metrics_listen and not is_loopback(metrics_listen) and not settings.allow_unauthenticated_metrics:
        raise CannotStart(
            f"--metrics-listen {metrics_listen}: whoever reaches this port could read metrics. Where that may be, give "
            "--allow-unauthenticated-metrics"
        )


def is_loopback(listen: str) -> bool:
    """Whether a host:port is reached from this machine only."""
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _named_by_certificate(common_name: str) -> Caller | None:
    return Caller(common_name, "certificate") if usable_tenant(common_name) else None


def _credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None:
        return None
    files = TlsFiles(cert=settings.tls_cert, key=settings.tls_key, ca=settings.tls_client_ca)
    return server_credentials(watched("--tls-cert, --tls-key, --tls-client-ca", files))


def _dialer(settings: SecuritySettings, peers: Callable[[], Tokens] | None) -> Dialer:
    if settings.mesh_ca is None:
        return Dialer(tokens=peers)
    files = TlsFiles(
        cert=settings.mesh_cert or settings.tls_cert, key=settings.mesh_key or settings.tls_key, ca=settings.mesh_ca
    )
    return Dialer(watched("--mesh-ca, --mesh-cert, --mesh-key", files), settings.mesh_tls_name, peers)
