"""API keys: a file has tenants and SHA-256 digests of their keys. The keys are nowhere but with their owners."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path
from typing import Final

from baton.rpc.caller import Caller
from baton.rpc.reloaded import Reloaded, UnusableFile, read_text

TENANT_RULE: Final = "1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a sign"

_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE: Final = re.compile(r"(?P<tenant>[^=\s]+)\s*=\s*(?:sha256:)?(?P<digest>[0-9a-f]{64})")
_OF_NOTHING: Final = hashlib.sha256(b"").hexdigest()
_PREFIX: Final = "bk_"


def usable_tenant(name: str) -> bool:
    """Whether a tenant may be called so: names go into caches' keys, metrics and logs."""
    return _TENANT.fullmatch(name) is not None


def new_key() -> str:
    """A key that nobody can guess: 256 bits. That is why a plain digest of it may lie in a file."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> dict[str, str]:
    """Tenants by digest.

    A line is `tenant = digest`, or empty, or begins with #. One wrong line makes the whole of it unusable: half a list
    of keys is no list.

    Raises:
        UnusableFile: naming the line, not what is in it.
    """
    tenants: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise UnusableFile(f"line {number} is not TENANT = SHA-256 digest of a key, 64 digits of 0-9 a-f")
        tenant, digest = parts["tenant"], parts["digest"]
        if not usable_tenant(tenant):
            raise UnusableFile(f"line {number}: a tenant's name is {TENANT_RULE}")
        if digest == _OF_NOTHING:
            raise UnusableFile(f"line {number} is the digest of an empty key")
        if digest in tenants:
            raise UnusableFile(f"line {number} has a digest that stands above already")
        tenants[digest] = tenant
    return tenants


class ApiKeys:
    """Who has which key.

    Args:
        path: the file; read again when it changes.

    Raises:
        OSError, UnusableFile: it cannot be read, or used.
    """

    def __init__(self, path: Path) -> None:
        # What a lookup's time may tell is then of digests that nobody outside can make.
        self._pepper = secrets.token_bytes(32)
        self._callers = Reloaded("--api-keys", (path,), lambda: self._load(path))

    def verify(self, key: str) -> Caller | None:
        """Whose key it is; None: nobody's."""
        digest = digest_of(key)
        found = self._callers.get().get(self._keyed(digest))
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1]

    def _load(self, path: Path) -> dict[bytes, tuple[str, Caller]]:
        tenants = parse_keys(read_text(path))
        return {
            self._keyed(digest): (digest, Caller(tenant, f"key {digest[:8]}")) for digest, tenant in tenants.items()
        }

    def _keyed(self, digest: str) -> bytes:
        return hashlib.blake2b(digest.encode(), key=self._pepper, digest_size=16).digest()
