"""Which slots hold which prefixes: an index of token blocks by a keyed chain of digests. Pure: no torch, no clock.

The digest of a block stands for the block, everything before it, and the salt of whoever asked. It is keyed with a
secret of this process, so nobody outside can compute one, and two salts never share an entry: neither a hit nor its
timing tells one tenant what another one asked. A digest only finds a candidate; the tokens themselves decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16
_PERSON = b"baton-prefix-v1"

Hash = Callable[[bytes, bytes], bytes]
"""(digest of what comes before, a block's bytes) -> digest of both."""


def keyed_hash(secret: bytes) -> Hash:
    """BLAKE2b keyed with `secret`, 1 to 64 bytes."""

    def digest(parent: bytes, data: bytes) -> bytes:
        state = blake2b(parent, digest_size=DIGEST_BYTES, key=secret, person=_PERSON)
        state.update(data)
        return state.digest()

    return digest


@dataclass(slots=True)
class Prefix:
    """What one slot holds: the first `blocks` whole blocks of `tokens`, computed and known to be finite.

    Attributes:
        slot: where.
        salt: of the request that left it.
        tokens: may be longer, and may grow at its end.
        digests: one per block.
        held: a request works in the slot; what is indexed does not change meanwhile.
    """

    slot: int
    salt: bytes
    tokens: Sequence[int]
    digests: tuple[bytes, ...]
    held: bool

    @property
    def blocks(self) -> int:
        """Whole blocks held."""
        return len(self.digests)


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """A run of blocks of one prefix that no slot held before.

    Attributes:
        salt: whose.
        parent: digest of the block before them; empty: they are the first ones.
        digests: one per block.
        tokens: of these blocks.
    """

    salt: bytes
    parent: bytes
    digests: Sequence[bytes]
    tokens: Sequence[int]


class PrefixIndex:
    """At most one prefix per slot; those of free slots in the order of their last use.

    What came and went since the last `changes` is kept until it is asked for: of a block that did both, nothing.

    Args:
        block_tokens: tokens of a block.
        digest: keyed.
    """

    def __init__(self, block_tokens: int, digest: Hash) -> None:
        self.block_tokens = block_tokens
        self._digest = digest
        self._prefixes: dict[int, Prefix] = {}  # by slot, the least recently used first
        self._slots: dict[bytes, dict[int, None]] = {}  # digest -> the slots whose prefix has it, in order of arrival
        self.free_blocks = 0  # of prefixes in free slots
        self._came: dict[bytes, tuple[Prefix, int, bytes]] = {}  # digest -> a prefix that has it, its block, its parent
        self._went: dict[bytes, None] = {}

    @property
    def free(self) -> list[Prefix]:
        """Prefixes in free slots, the least recently used first."""
        return [prefix for prefix in self._prefixes.values() if not prefix.held]

    def __getitem__(self, slot: int) -> Prefix | None:
        """What the slot holds."""
        return self._prefixes.get(slot)

    def chain(self, salt: bytes, tokens: Sequence[int], blocks: int, known: Sequence[bytes] = ()) -> list[bytes]:
        """Digests of the first `blocks` blocks of `tokens`.

        Args:
            known: digests of the same tokens, of fewer or of more blocks.
        """
        digests = list(known[:blocks])
        parent = digests[-1] if digests else self._digest(b"", salt)
        for block in range(len(digests), blocks):
            first = block * self.block_tokens
            parent = self._digest(parent, array("Q", tokens[first : first + self.block_tokens]).tobytes())
            digests.append(parent)
        return digests

    def find(self, salt: bytes, tokens: Sequence[int], digests: Sequence[bytes]) -> tuple[Prefix, int] | None:
        """The longest prefix of `tokens` that a slot holds, and its tokens.

        Of several that are as long, a free one of which little else would be lost.

        Args:
            digests: of the blocks that may be found.
        """
        depth = 0
        while depth < len(digests) and digests[depth] in self._slots:
            depth += 1
        if not depth:
            return None
        count = depth * self.block_tokens
        candidates = [self._prefixes[slot] for slot in self._slots[digests[depth - 1]]]
        # A collision of digests is a miss, never another one's keys and values.
        same = [p for p in candidates if p.salt == salt and p.blocks >= depth and p.tokens[:count] == tokens[:count]]
        return (min(same, key=lambda prefix: (prefix.held, prefix.blocks)), count) if same else None

    def put(self, prefix: Prefix) -> None:
        """A slot holds a prefix now, instead of what it held: the most recently used one. Empty: it holds none."""
        self.trim(prefix.slot)
        if not prefix.digests:
            return
        self._prefixes[prefix.slot] = prefix
        self.free_blocks += 0 if prefix.held else prefix.blocks
        for block, digest in enumerate(prefix.digests):
            if (slots := self._slots.get(digest)) is None:
                slots = self._slots[digest] = {}
                if digest in self._went:
                    del self._went[digest]
                else:
                    self._came[digest] = prefix, block, prefix.digests[block - 1] if block else b""
            slots[prefix.slot] = None

    def trim(self, slot: int, blocks: int = 0) -> None:
        """The slot holds no more than the first `blocks` blocks of its prefix, if it holds one."""
        prefix = self._prefixes.get(slot)
        if prefix is None or blocks >= prefix.blocks:
            return
        gone, prefix.digests = prefix.digests[blocks:], prefix.digests[:blocks]
        self.free_blocks -= 0 if prefix.held else len(gone)
        for digest in set(gone).difference(prefix.digests):
            slots = self._slots[digest]
            del slots[slot]
            if not slots:
                del self._slots[digest]
                if self._came.pop(digest, None) is None:
                    self._went[digest] = None
        if not blocks:
            del self._prefixes[slot]

    def changes(self) -> tuple[list[NewBlocks], list[bytes]]:
        """Blocks that some slot holds, and digests of those that none does any more, since the last call.

        What a block follows was told before it, or is in the list before it.
        """
        size, runs = self.block_tokens, list[tuple[Prefix, int, bytes, list[bytes]]]()
        for digest, (prefix, block, parent) in self._came.items():
            if runs and runs[-1][0] is prefix and runs[-1][1] + len(runs[-1][3]) == block:
                runs[-1][3].append(digest)
            else:
                runs.append((prefix, block, parent, [digest]))
        came = [
            NewBlocks(prefix.salt, parent, digests, prefix.tokens[first * size : (first + len(digests)) * size])
            for prefix, first, parent, digests in runs
        ]
        went = list(self._went)
        self._came.clear()
        self._went.clear()
        return came, went

    def use(self, slot: int) -> None:
        """A prefix was used: it goes last."""
        self._prefixes[slot] = self._prefixes.pop(slot)

    def covering(self, prefix: Prefix) -> Prefix | None:
        """A free slot's prefix that holds all that `prefix` does."""
        found = self.find(prefix.salt, prefix.tokens, prefix.digests)
        whole = found is not None and not found[0].held and found[1] == prefix.blocks * self.block_tokens
        return found[0] if found is not None and whole else None

    def covered(self, prefix: Prefix) -> list[Prefix]:
        """Prefixes in other free slots that `prefix` holds all of."""
        slots = self._slots.get(prefix.digests[0], {}) if prefix.digests else {}
        others = [self._prefixes[slot] for slot in slots if slot != prefix.slot]
        return [other for other in others if not other.held and _begins(prefix, other, self.block_tokens)]


def _begins(longer: Prefix, shorter: Prefix, block_tokens: int) -> bool:
    count = shorter.blocks * block_tokens
    return (
        shorter.salt == longer.salt
        and shorter.blocks <= longer.blocks
        and shorter.digests[-1] == longer.digests[shorter.blocks - 1]
        and shorter.tokens[:count] == longer.tokens[:count]
    )
