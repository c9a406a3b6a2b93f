"""What one router is told of a worker's prefix cache: all of it at first, then what comes and goes. Pure."""

from __future__ import annotations

from itertools import islice
from typing import Final

from baton.engine.prefix_mirror import PrefixMirror
from baton.internal.v1 import worker_pb2
from baton.worker.digests import BlockDigests, number

MAX_BLOCKS: Final = 4096
"""Of a message: two milliseconds of hashing. What is more comes with the next ones."""


class PrefixFeed:
    """Follows a mirror for one stream, in the router's digests.

    What waits to be told is bounded by what the cache holds and held: a block that came and went unseen is not told.

    Args:
        mirror: of the engine's cache.
        key: the router's.
    """

    def __init__(self, mirror: PrefixMirror, key: bytes) -> None:
        self._mirror = mirror
        self._digests = BlockDigests(key)
        self._told: dict[bytes, bytes] = {}  # by the engine's digest, in the router's
        self._came = dict.fromkeys(mirror.blocks)
        self._went: dict[bytes, bytes] = {}
        self._sequence = 0
        mirror.follow(self)

    def close(self) -> None:
        """Follow no more."""
        self._mirror.unfollow(self)

    def came(self, digest: bytes) -> None:
        """A block is there."""
        if (told := self._went.pop(digest, None)) is not None:
            self._told[digest] = told
        else:
            self._came[digest] = None

    def went(self, digest: bytes) -> None:
        """It is not any more."""
        if digest in self._came:
            del self._came[digest]
        elif (told := self._told.pop(digest, None)) is not None:
            self._went[digest] = told

    def changes(self) -> worker_pb2.PrefixChanges | None:
        """The next message; None: there is nothing to tell. The first one always is there."""
        if self._sequence and not self._came and not self._went:
            return None
        self._sequence += 1
        removed = list(islice(self._went, MAX_BLOCKS))
        message = worker_pb2.PrefixChanges(
            sequence=self._sequence,
            snapshot=self._sequence == 1,
            block_tokens=self._mirror.block_tokens,
            removed=[number(self._went.pop(digest)) for digest in removed],
        )
        for digest in list(islice(self._came, MAX_BLOCKS - len(removed))):
            del self._came[digest]
            self._told[digest] = self._translate(digest)
            message.added.append(number(self._told[digest]))
        return message

    def _translate(self, digest: bytes) -> bytes:
        block = self._mirror.blocks[digest]
        # A parent is told before its child, and a block whose child is there is there.
        parent = self._told[block.parent] if block.parent else self._digests.root(block.salt)
        return self._digests.after(parent, block.data)
