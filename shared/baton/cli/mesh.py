"""A running mesh as one JSON file: where its services listen. `baton up` writes it, the other commands read it."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from baton.client.failover import split_targets

DEFAULT_TARGET: Final = "127.0.0.1:50051"
DEFAULT_ADMIN: Final = "127.0.0.1:50052"


@dataclass(frozen=True, slots=True)
class Process:
    """One service process."""

    name: str
    """Unique in the mesh, for example "decode-0"."""
    service: str
    """"router", "cache", "prefill" or "decode"."""
    grpc: str
    metrics: str
    pid: int
    admin: str = ""
    """host:port of its operators' port."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """A mesh that serves."""

    version: str
    router: str
    """host:port of the public API."""
    model: str
    """Name clients call the model by."""
    redis: str
    """URL of its Redis."""
    pid: int
    """The `baton up` that owns it."""
    services: tuple[Process, ...]
    ca: str = ""
    """PEM file of the CA that signed the router's certificate; empty: no TLS."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    def alive(self) -> bool:
        """Whether the `baton up` that owns it still runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def from_json(values: dict[str, Any]) -> Mesh:
    """The mesh a ready file describes.

    Raises:
        KeyError, TypeError: it describes none.
    """
    return Mesh(
        version=values["version"],
        router=values["router"],
        model=values["model"],
        redis=values["redis"],
        pid=values["pid"],
        services=tuple(Process(**entry) for entry in values["services"]),
        ca=values.get("ca", ""),
    )


def read(path: Path) -> Mesh | None:
    """The mesh in a ready file; None when there is none, or nothing that reads as one."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, mesh: Mesh) -> None:
    """Write a ready file so that a reader sees all of it or none.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(mesh.to_json(), indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def remove(path: Path, pid: int) -> None:
    """Remove a ready file if it is still that of the `baton up` with this pid, and not of one started since."""
    mesh = read(path)
    if mesh is not None and mesh.pid == pid:
        path.unlink(missing_ok=True)


def last_ready_file() -> Path:
    """Where this user's latest mesh is remembered. Its directory exists and belongs to the user alone.

    Raises:
        PermissionError: somebody else owns the directory.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(base) / "baton" if base else Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user")
    return directory / "ready.json"


def last() -> Mesh | None:
    """This user's latest mesh, if it still runs."""
    try:
        mesh = read(last_ready_file())
    except OSError:
        return None
    return mesh if mesh is not None and mesh.alive() else None


def router_or_default(target: str | None) -> str:
    """As `target_or_default`, for what looks at one router: of several the first."""
    return split_targets(target_or_default(target))[0]


def target_or_default(target: str | None) -> str:
    """The router, or routers, to talk to: those named, else the latest mesh's, else the default port."""
    if target:
        return target
    mesh = last()
    return mesh.router if mesh else DEFAULT_TARGET


def admin_or_default(admin: str | None, service: str = "router") -> str:
    """The operators' port to talk to: the one named, else that of the latest mesh's service, else the default."""
    if admin:
        return admin
    mesh = last()
    known = [process.admin for process in mesh.services if process.service == service] if mesh else []
    return known[0] if known and known[0] else DEFAULT_ADMIN
