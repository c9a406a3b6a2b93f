"""Who holds which slot and how many blocks, and which free slots keep a prefix for a later request. Pure.

A free slot that keeps a prefix is as free as any other: it never makes a request wait. Its blocks are counted, so that
what is held and what is kept never exceed the capacity together, and it is given up, the least recently used first, as
soon as somebody needs them or the slot itself.

What this means for the memory is said in operations, which whoever owns the memory carries out in their order, before
anything else is done to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.messages import Role
from baton.engine.prefix import Prefix, PrefixIndex
from baton.engine.request import Request

MOSTLY = 7 / 8
"""So much of a kept prefix must a request share to take the very slot over; below, it gets a copy."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens [0, tokens), whole blocks, of slot `source` are the first ones of slot `target` too."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody holds the slot any more.

    Attributes:
        kept: tokens [0, kept) are finite and stay as they are; 0: nothing needs to stay.
        clean: whether all the slot holds is known to be finite.
        foreign: another process may have written behind the request's tokens.
    """

    slot: int
    kept: int
    clean: bool
    foreign: bool


Operation = Copy | Free


class Slots:
    """The slots' numbers, the block budget, and the prefixes in the slots.

    Args:
        num_slots: of the pool.
        capacity_blocks: to hold and to keep.
        prefixes: index of what slots hold; None: free slots keep nothing.

    Attributes:
        total: slots.
        used_blocks: held by requests.
    """

    def __init__(self, num_slots: int, capacity_blocks: int, prefixes: PrefixIndex | None = None) -> None:
        self.total = num_slots
        self.used_blocks = 0
        self._capacity_blocks = capacity_blocks
        self._prefixes = prefixes
        self._free = list(range(num_slots))  # ascending: the lowest number is taken first, so that slots stay dense
        self._operations: list[Operation] = []

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Free slots that keep a prefix."""
        return len(self._prefixes.free) if self._prefixes is not None else 0

    @property
    def kept_blocks(self) -> int:
        """Blocks of prefixes in free slots."""
        return self._prefixes.free_blocks if self._prefixes is not None else 0

    def drain(self) -> list[Operation]:
        """The operations since the last call, which are carried out now."""
        operations, self._operations = self._operations, []
        return operations

    def looks_up(self, request: Request) -> bool:
        """Whether a prefix is looked for."""
        return self._prefixes is not None and request.prefix_cache

    def fits(self, blocks: int) -> bool:
        """Whether there is a slot with so many blocks."""
        return bool(self._free) and self.can_grow(blocks)

    def can_grow(self, blocks: int) -> bool:
        """Whether so many more blocks can be held."""
        return self.used_blocks + blocks <= self._capacity_blocks

    def take(self, request: Request, blocks: int) -> None:
        """Give a request a slot; what a prefix saves it counts as computed. Needs `fits`."""
        hit, tokens = self._find(request)
        if hit is not None and self._can_have(hit, tokens, blocks):
            slot = hit.slot
        else:
            slot = self._unneeded(hit)
            if hit is not None:
                self._operations.append(Copy(hit.slot, slot, tokens))
        self._free.remove(slot)
        request.slot = slot
        request.computed = request.proven = request.hit = tokens
        self.publish(request)
        self.grow(request, blocks)

    def grow(self, request: Request, blocks: int) -> None:
        """A request holds so many blocks from now on. Needs `can_grow`."""
        self.used_blocks += blocks - request.blocks
        request.blocks = blocks
        while (excess := self.used_blocks + self.kept_blocks - self._capacity_blocks) > 0:
            assert self._prefixes is not None
            oldest = self._prefixes.free[0]
            self._give_up(oldest, max(0, oldest.blocks - excess))

    def publish(self, request: Request) -> None:
        """Others may copy what a request has and is known to be finite."""
        if self._prefixes is not None and request.prefix_cache:
            self._prefixes.put(self._prefix(self._prefixes, request, held=True))

    def give(self, request: Request) -> None:
        """Take the slot back; it keeps the request's finite tokens, unless another free slot has them too."""
        slot, self.used_blocks = request.slot, self.used_blocks - request.blocks
        self._free.append(slot)
        self._free.sort()
        clean = request.proven == request.computed > request.hit  # so that whatever was written was read since
        kept = self._keep(self._prefixes, request) if self._prefixes is not None else 0
        self._operations.append(Free(slot, kept, clean, foreign=request.role is Role.RECEIVE))
        request.slot, request.blocks = -1, 0
        request.computed = request.proven = request.hit = 0

    def _find(self, request: Request) -> tuple[Prefix | None, int]:
        """The longest prefix somebody has, and its tokens. One token at least is left: its logits are needed."""
        if self._prefixes is None or not request.prefix_cache:
            return None, 0
        blocks = (len(request.tokens) - 1) // self._prefixes.block_tokens
        request.digests = self._prefixes.chain(request.cache_salt, request.tokens, blocks, request.digests)
        found = self._prefixes.find(request.cache_salt, request.tokens, request.digests[:blocks])
        if found is None:
            return None, 0
        self._prefixes.use(found[0].slot)
        return found

    def _can_have(self, hit: Prefix, tokens: int, blocks: int) -> bool:
        """Whether a request takes a prefix's own slot: it is free, and little is lost, or would be kept otherwise."""
        assert self._prefixes is not None
        if hit.held:
            return False
        mostly = tokens >= MOSTLY * hit.blocks * self._prefixes.block_tokens
        return mostly or len(self._free) == 1 or not self.can_grow(blocks + hit.blocks)

    def _unneeded(self, spared: Prefix | None) -> int:
        """A free slot that keeps nothing, or else the one whose prefix was not used for longest, but for `spared`."""
        if self._prefixes is None:
            return self._free[0]
        for slot in self._free:
            if self._prefixes[slot] is None:
                return slot
        oldest = next(prefix for prefix in self._prefixes.free if prefix is not spared)
        self._give_up(oldest)
        return oldest.slot

    def _give_up(self, prefix: Prefix, blocks: int = 0) -> None:
        """A free slot keeps no more than so many blocks: the end of a prefix goes before its beginning."""
        assert self._prefixes is not None
        self._prefixes.trim(prefix.slot, blocks)
        kept = blocks * self._prefixes.block_tokens
        self._operations.append(Free(prefix.slot, kept, clean=True, foreign=False))

    def _keep(self, prefixes: PrefixIndex, request: Request) -> int:
        """Tokens that the slot a request leaves goes on holding."""
        prefixes.trim(request.slot)
        prefix = self._prefix(prefixes, request, held=False)
        if (other := prefixes.covering(prefix)) is not None:
            prefixes.use(other.slot)
            return 0
        for other in prefixes.covered(prefix):
            self._give_up(other)
        prefixes.put(prefix)
        return prefix.blocks * prefixes.block_tokens

    @staticmethod
    def _prefix(prefixes: PrefixIndex, request: Request, *, held: bool) -> Prefix:
        blocks = request.proven // prefixes.block_tokens if request.prefix_cache else 0
        if blocks > len(request.digests):
            request.digests = prefixes.chain(request.cache_salt, request.tokens, blocks, request.digests)
        return Prefix(request.slot, request.cache_salt, request.tokens, tuple(request.digests[:blocks]), held)
