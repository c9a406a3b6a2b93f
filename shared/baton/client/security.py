"""How a client shows who it is, and knows whom it talks to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS towards a router.

    Attributes:
        ca: PEM file of those who may have signed its certificate; None: the system's.
        cert: PEM certificate to show, for routers that ask for one.
        key: its private key.
        server_name: that the router's certificate must have, where it is not the host of the target.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key: one needs the other")

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC has them. Raises OSError when a file cannot be read."""
        ca, key, cert = (path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def options(self) -> list[tuple[str, int | str]]:
        """What a channel needs besides."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    """Metadata that carry an API key or a JSON Web Token; empty: none."""
    return (("authorization", f"Bearer {credential}"),) if credential else ()
