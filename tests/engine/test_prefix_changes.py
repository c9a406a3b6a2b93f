"""What an index tells of its blocks adds up to what it holds, however it got there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.messages import CachedBlocks, PrefixChanges
from baton.engine.prefix import Prefix, PrefixIndex, keyed_hash
from baton.engine.prefix_mirror import PrefixMirror
from baton.worker.digests import BlockDigests
from baton.worker.prefix_feed import PrefixFeed

BLOCK = 2
KEY = b"the router's key"
TOKENS = st.lists(st.integers(0, 1), max_size=10)
SALTS = st.sampled_from([b"", b"a"])
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "trim", "tell", "send"]), st.integers(0, 3), SALTS, TOKENS), max_size=24
)


def held(index: PrefixIndex, slots: int) -> set[tuple[bytes, tuple[int, ...]]]:
    """Salt and tokens of every block, with all before it."""
    prefixes = [prefix for slot in range(slots) if (prefix := index[slot]) is not None]
    return {(p.salt, tuple(p.tokens[: (i + 1) * BLOCK])) for p in prefixes for i in range(p.blocks)}


@settings(max_examples=300, deadline=None)
@given(operations=OPERATIONS)
def test_a_router_knows_what_is_there(operations: list[tuple[str, int, bytes, list[int]]]) -> None:
    index = PrefixIndex(BLOCK, keyed_hash(b"the engine's"))
    mirror = PrefixMirror()
    early = PrefixFeed(mirror, KEY)
    known: set[int] = set()

    def tell() -> None:
        came, went = index.changes()
        added = [CachedBlocks(new.salt, new.parent, list(new.digests), list(new.tokens)) for new in came]
        mirror.take(PrefixChanges(block_tokens=BLOCK, added=added, removed=went))

    def send(feed: PrefixFeed, router: set[int]) -> None:
        while (message := feed.changes()) is not None:
            assert router.isdisjoint(message.added), "what is there does not come"
            assert router.issuperset(message.removed), "what is not there does not go"
            router.difference_update(message.removed)
            router.update(message.added)

    for what, slot, salt, tokens in operations:
        blocks = len(tokens) // BLOCK
        if what == "put":
            index.put(Prefix(slot, salt, tokens, tuple(index.chain(salt, tokens, blocks)), held=False))
        elif what == "trim":
            index.trim(slot, blocks)
        elif what == "tell":
            tell()
        else:
            send(early, known)
    tell()
    send(early, known)
    late_known: set[int] = set()
    send(PrefixFeed(mirror, KEY), late_known)

    digests = BlockDigests(KEY)
    expected = {digests.chain(salt, tokens, BLOCK)[-1] for salt, tokens in held(index, 4)}
    assert known == late_known == expected
    assert len(mirror.blocks) == len(expected)


def test_two_salts_and_two_keys_have_nothing_in_common() -> None:
    tokens = list(range(64))
    chains = [
        BlockDigests(key).chain(salt, tokens, 16)
        for key in (b"k" * 16, b"l" * 16)
        for salt in (b"", b"a", b"b", bytes(32))
    ]
    assert len({digest for chain in chains for digest in chain}) == 8 * 4
