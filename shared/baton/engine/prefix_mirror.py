"""What an engine's prefix cache holds, as its front knows it from what the engine tells. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

from baton.engine.messages import PrefixChanges


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """One block.

    Attributes:
        salt: whose.
        parent: the engine's digest of the block before it; empty: it is the first one.
        data: its token ids, 4 bytes each.
    """

    salt: bytes
    parent: bytes
    data: bytes


class Follower(Protocol):
    """Somebody who wants to know what comes and goes, by the engine's digests."""

    def came(self, digest: bytes) -> None: ...

    def went(self, digest: bytes) -> None: ...


class PrefixMirror:
    """All blocks of the cache by the engine's digests, each after the one it follows.

    Attributes:
        block_tokens: tokens of a block; 0: nothing was told yet.
        blocks: what is there.
    """

    def __init__(self) -> None:
        self.block_tokens = 0
        self.blocks: dict[bytes, CachedBlock] = {}
        self._followers: list[Follower] = []

    def take(self, changes: PrefixChanges) -> None:
        """The engine told what changed."""
        self.block_tokens = changes.block_tokens
        for digest in changes.removed:
            self.blocks.pop(digest, None)
            for follower in self._followers:
                follower.went(digest)
        for run in changes.added:
            parent, tokens = run.parent, array("I", run.token_ids)
            for i, digest in enumerate(run.digests):
                data = tokens[i * self.block_tokens : (i + 1) * self.block_tokens].tobytes()
                self.blocks[digest] = CachedBlock(run.salt, parent, data)
                parent = digest
                for follower in self._followers:
                    follower.came(digest)

    def follow(self, follower: Follower) -> None:
        """Tell somebody of every change from now on."""
        self._followers.append(follower)

    def unfollow(self, follower: Follower) -> None:
        """And no more."""
        self._followers.remove(follower)
