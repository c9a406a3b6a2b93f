"""How the commands reach a mesh: TLS, keys, tokens. From files and the environment: anyone can read a flag's value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import grpc

from baton.cli import console, mesh
from baton.client import AsyncClient, Client, Tls
from baton.client.channel import CLIENT_CHANNEL_OPTIONS
from baton.client.security import bearer
from baton.rpc.metadata_channel import MetadataChannel

_API_KEY: Final = "BATON_API_KEY"
_ADMIN_TOKEN: Final = "BATON_ADMIN_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What commands were told of a mesh.

    Attributes:
        tls: None: plain text, unless the mesh is this user's latest, which said what it has.
        api_key: of a client.
        admin_token: of an operator.
    """

    tls: Tls | None = None
    api_key: str = ""
    admin_token: str = ""

    def towards(self, target: str) -> Connection:
        """The same, with what is known of this user's latest mesh if that is where it goes."""
        if self.tls is not None:
            return self
        known = mesh.last()
        if known is None or not known.ca or known.router != target:
            return self
        return replace(self, tls=Tls(ca=Path(known.ca)))

    @property
    def admin_metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls of an operators' port carry."""
        return bearer(self.admin_token)


_chosen: ContextVar[Connection] = ContextVar("connection", default=Connection())  # noqa: B039 frozen


def choose(
    *,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    server_name: str,
    api_key_file: Path | None,
    admin_token_file: Path | None,
) -> None:
    """Set what the commands of this run use. Ends the run when it makes no sense."""
    chosen = None
    if tls or ca or cert or key or server_name:
        try:
            chosen = Tls(ca=ca, cert=cert, key=key, server_name=server_name)
        except ValueError:
            console.fail("--cert, --key: one needs the other", code=2)
    _chosen.set(
        Connection(
            tls=chosen,
            api_key=_secret(api_key_file, "--api-key-file", _API_KEY),
            admin_token=_secret(admin_token_file, "--admin-token-file", _ADMIN_TOKEN),
        )
    )


def _secret(path: Path | None, flag: str, variable: str) -> str:
    if path is None:
        return os.environ.get(variable, "").strip()
    try:
        return path.read_text(encoding="utf-8").strip().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        console.fail(f"{flag} {path}: cannot be read: {type(error).__name__}", code=2)


def chosen() -> Connection:
    """What this run uses."""
    return _chosen.get()


@contextmanager
def readable_files() -> Iterator[None]:
    """End the command where a certificate cannot be read."""
    try:
        yield
    except OSError as error:
        console.fail(f"{error.filename}: {error.strerror}", code=2)


def client(target: str) -> Client:
    """A client of a router."""
    how = chosen().towards(target)
    with readable_files():
        return Client(target, tls=how.tls, api_key=how.api_key)


def async_client(target: str, timeout: float) -> AsyncClient:
    """A client of a router, for asyncio."""
    how = chosen().towards(target)
    with readable_files():
        return AsyncClient(target, timeout=timeout, tls=how.tls, api_key=how.api_key)


def channel(target: str) -> grpc.aio.Channel:
    """A channel to a router, with a client's credentials."""
    how = chosen().towards(target)
    if how.tls is None:
        bare = grpc.aio.insecure_channel(target, options=CLIENT_CHANNEL_OPTIONS)
    else:
        with readable_files():
            credentials = how.tls.credentials()
        options = [*CLIENT_CHANNEL_OPTIONS, *how.tls.options()]
        bare = grpc.aio.secure_channel(target, credentials, options=options)
    metadata = bearer(how.api_key)
    return MetadataChannel(bare, lambda: metadata) if metadata else bare
