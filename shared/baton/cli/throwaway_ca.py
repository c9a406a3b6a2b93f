"""Certificates of a CA that lives as long as a mesh on one machine: for trying TLS, and for tests."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAYS: Final = 30
_BEFORE: Final = datetime.timedelta(hours=1)  # clocks may be apart


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files of a certificate and its private key."""

    cert: Path
    key: Path


class ThrowawayCa:
    """A CA whose key is never written anywhere.

    Args:
        directory: where certificates go, and keys, readable by their owner alone.
        name: of the CA; its certificate is in `ca`.

    Raises:
        OSError: files cannot be written.
    """

    def __init__(self, directory: Path, name: str = "Baton throw-away CA") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        authority = x509.BasicConstraints(ca=True, path_length=0)
        certificate = _builder(self._name, self._name, self._key).add_extension(authority, critical=True)
        self.ca = directory / f"{name.replace(' ', '-').lower()}.pem"
        self.ca.write_bytes(_pem(certificate.sign(self._key, hashes.SHA256())))

    def issue(
        self, common_name: str, names: Sequence[str] = (), addresses: Sequence[str] = (), file: str = ""
    ) -> CertificateFiles:
        """A new certificate for servers and clients.

        Args:
            common_name: for people; routers that ask for certificates only take it for the tenant's.
            names: DNS names it is for.
            addresses: IP addresses it is for.
            file: what its files are called, if not as the common name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [
            *(x509.DNSName(name) for name in names),
            *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses),
        ]
        builder = _builder(_named(common_name), self._name, key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        files = CertificateFiles(*(self._directory / f"{file or common_name}.{kind}" for kind in ("pem", "key")))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(files.key, private, 0o600)
        _write(files.cert, _pem(builder.sign(self._key, hashes.SHA256())), 0o644)
        return files


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all: a running service may be reading it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.replace(path)
