"""Digests that a router and the workers it watches have in common, to speak of prefixes without saying them. Pure.

A router draws a key when it starts and gives it to every worker it watches. Both sides compute the digest of a block
from the key, the salt of whoever asked, and all tokens up to the block's end. So a digest says nothing to anybody who
has not the key, two salts never have one in common, and no worker ever says what its own index is keyed with. A digest
only guides placement: what a request may use is decided by the engine, which compares the tokens.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Final

MIN_KEY_BYTES: Final = 16
MAX_KEY_BYTES: Final = 64
_DIGEST_BYTES: Final = 8
_PERSON: Final = b"baton-route-v1"


def new_key() -> bytes:
    """A key that nobody else has."""
    return secrets.token_bytes(32)


class BlockDigests:
    """Digests of blocks under one key.

    Args:
        key: MIN_KEY_BYTES to MAX_KEY_BYTES.
    """

    def __init__(self, key: bytes) -> None:
        assert MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES
        self._keyed = blake2b(digest_size=_DIGEST_BYTES, key=key, person=_PERSON)

    def root(self, salt: bytes) -> bytes:
        """What the first block follows."""
        return self.after(b"", salt)

    def after(self, parent: bytes, data: bytes) -> bytes:
        """Digest of a block, `data`, that follows the one with the digest `parent`."""
        state = self._keyed.copy()
        state.update(parent)
        state.update(data)
        return state.digest()

    def chain(self, salt: bytes, token_ids: Sequence[int], block_tokens: int) -> list[int]:
        """Of all whole blocks of a prompt, in order; 0.5 us each."""
        return [number(digest) for digest in self._walk(salt, token_ids, block_tokens)]

    def _walk(self, salt: bytes, token_ids: Sequence[int], block_tokens: int) -> Iterator[bytes]:
        data, size, parent = array("I", token_ids).tobytes(), 4 * block_tokens, self.root(salt)
        for end in range(size, len(data) + 1, size):
            parent = self.after(parent, data[end - size : end])
            yield parent


def number(digest: bytes) -> int:
    """A digest as it is sent."""
    return int.from_bytes(digest, "little")
