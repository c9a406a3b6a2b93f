"""What each tenant may have: a TOML file, read again when it changes.

[default]                       # every tenant without a table of its own, and callers without a tenant
requests_per_minute = 600

[tenants.acme]
class = "gold"
weight = 4.0
max_concurrency = 64
"""

from __future__ import annotations

import logging
import os
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)


class TenantsFileError(Exception):
    """The file cannot be used; the message names file and field."""


class TenantPolicy(BaseModel):
    """What one tenant may have. Unset: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    tenant_class: Annotated[str, Field(alias="class", pattern=r"^[a-z0-9_-]{1,32}$")] = "default"
    """What its figures are counted under: metrics know classes, not tenants."""
    weight: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    """Its share of the workers beside other tenants that wait."""
    requests_per_minute: Annotated[float | None, Field(gt=0)] = None
    tokens_per_minute: Annotated[float | None, Field(gt=0)] = None
    """Of prompts and answers together."""
    max_concurrency: Annotated[int | None, Field(ge=1)] = None
    """Requests it may have here at once, waiting ones included."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of all places, on the workers and in the router, it has no more at once, whoever else is there."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: TenantPolicy = TenantPolicy()
    tenants: dict[str, TenantPolicy] = {}


class Tenants:
    """The policies as of now.

    Args:
        path: of the file; None: everybody is alike and without limits.

    Raises:
        TenantsFileError: it cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # Where nobody is told apart from anybody, keeping places free for others would only waste them.
        self._file = _File(default=TenantPolicy(max_share=1.0))
        self._stamp: tuple[int, int, int] | None = None
        if path is not None:
            self._stamp = _stamp(path)
            self._file = _read(path)

    def policy(self, tenant: str) -> TenantPolicy:
        """What a tenant may have; a table of its own replaces the default one as a whole."""
        return self._file.tenants.get(tenant, self._file.default)

    def classes(self) -> set[str]:
        """All classes there are."""
        return {policy.tenant_class for policy in (self._file.default, *self._file.tenants.values())}

    def reload(self) -> bool:
        """Read the file again if it changed; whether it did. One that cannot be used leaves everything as it was."""
        if self._path is None:
            return False
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            self._file = _read(self._path)
        except TenantsFileError as error:
            log.error("the limits stay as they were: %s", error)
            return False
        log.info("read the limits of tenants again", extra={"tenants": len(self._file.tenants)})
        return True


def _stamp(path: Path) -> tuple[int, int, int]:
    """What differs between two versions of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise TenantsFileError(f"{path}: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TenantsFileError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TenantsFileError(f"{path}: {error}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(str(part) for part in wrong["loc"])
        raise TenantsFileError(f"{path}: {field}: {wrong['msg']}") from error
