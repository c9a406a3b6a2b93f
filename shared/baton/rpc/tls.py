"""Certificates: for those who call, and for those who are called. Both are read again when they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.rpc.cannot_start import CannotStart
from baton.rpc.reloaded import Reloaded, UnusableFile, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files.

    Attributes:
        cert: a certificate and what leads from it to a CA.
        key: its private key.
        ca: who may have signed the other side's; None: for a caller, the system's CAs; for a server, nobody asks.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        assert (self.cert is None) == (self.key is None)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(path for path in (self.cert, self.key, self.ca) if path is not None)

    def load(self) -> Pems:
        """Read and check them.

        Raises:
            OSError, UnusableFile: one cannot be read, or is not what it should be, or the key is another certificate's.
        """
        pems = Pems(*(None if path is None else path.read_bytes() for path in (self.cert, self.key, self.ca)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password="")
            except (ssl.SSLError, ValueError):
                raise UnusableFile("certificate and key are no PEM pair without a password") from None
        if pems.ca is not None:
            try:
                context.load_verify_locations(cadata=pems.ca.decode("ascii"))
            except (ssl.SSLError, ValueError):
                raise UnusableFile("the CA's certificates are not PEM") from None
        return pems


@dataclass(frozen=True, slots=True)
class Pems:
    """What the files hold."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


def watched(flag: str, files: TlsFiles) -> Reloaded[Pems]:
    """The files' content, as it is now.

    Raises:
        CannotStart: they cannot be used.
    """
    try:
        return Reloaded(flag, files.paths, files.load)
    except (OSError, UnusableFile) as error:
        raise CannotStart(f"{flag}: {reason(error)}") from None


def server_credentials(pems: Reloaded[Pems]) -> grpc.ServerCredentials:
    """Credentials of one port of a server; each handshake has the certificate of its time.

    Where the files have a CA, callers must show a certificate that it signed.
    """
    told = pems.version

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        now = pems.get()
        if told == pems.version:
            return None
        told = pems.version
        return _configuration(now)

    first = pems.get()
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first),
        changed,  # type: ignore[arg-type]  # None is: as before
        require_client_authentication=first.ca is not None,
    )


def channel_credentials(pems: Pems) -> grpc.ChannelCredentials:
    """Credentials of a caller."""
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    assert pems.key is not None
    assert pems.cert is not None
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], root_certificates=pems.ca)
