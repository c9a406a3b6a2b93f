"""Whose computed prefixes a request may use, in terms that workers cannot turn into tenants, and nobody can guess."""

from __future__ import annotations

from hashlib import blake2b


class Salts:
    """Salts of prefix caches.

    Args:
        secret: that they are keyed with. Routers that share it share prefix caches.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = blake2b(secret, digest_size=32, person=b"baton-salt-key").digest()

    def derive(self, tenant: str, salt: str) -> bytes:
        """32 bytes that differ between tenants, and between the salts that their requests name; empty for neither."""
        if not tenant and not salt:
            return b""
        state = blake2b(digest_size=32, key=self._key, person=b"baton-salt-v1")
        for part in (tenant.encode(), salt.encode()):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return state.digest()
