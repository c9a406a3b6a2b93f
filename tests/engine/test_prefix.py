"""The index finds the longest prefix there is, of the same salt and the same tokens, and never anything else."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.prefix import DIGEST_BYTES, Hash, Prefix, PrefixIndex, keyed_hash

BLOCK = 2
TOKENS = st.lists(st.integers(0, 1), max_size=10)
SALTS = st.sampled_from([b"", b"a", b"b"])


def collides(parent: bytes, data: bytes) -> bytes:
    """The worst digest there can be."""
    return bytes(DIGEST_BYTES)


def a_prefix(index: PrefixIndex, slot: int, tokens: Sequence[int], salt: bytes = b"", *, held: bool = False) -> Prefix:
    blocks = len(tokens) // index.block_tokens
    return Prefix(slot, salt, list(tokens), tuple(index.chain(salt, tokens, blocks)), held)


def find(index: PrefixIndex, tokens: Sequence[int], salt: bytes = b"") -> tuple[int, int] | None:
    """(slot, tokens)."""
    found = index.find(salt, list(tokens), index.chain(salt, tokens, len(tokens) // index.block_tokens))
    return None if found is None else (found[0].slot, found[1])


def longest_common(one: Sequence[int], other: Sequence[int], block: int) -> int:
    """Tokens, in whole blocks."""
    same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(one), len(other)) if same is None else same) // block * block


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "trim", "use"]), st.integers(0, 3), SALTS, TOKENS, st.booleans()),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(operations=OPERATIONS, asked=TOKENS, salt=SALTS, hashed=st.sampled_from([keyed_hash(b"secret"), collides]))
def test_the_longest_is_found_and_nothing_wrong(
    operations: list[tuple[str, int, bytes, list[int], bool]], asked: list[int], salt: bytes, hashed: Hash
) -> None:
    index = PrefixIndex(BLOCK, hashed)
    held: dict[int, tuple[bytes, list[int], bool]] = {}  # the same without digests, in order of use
    for what, slot, of, tokens, busy in operations:
        if what == "put":
            index.put(a_prefix(index, slot, tokens, of, held=busy))
            held.pop(slot, None)
            held[slot] = (of, tokens[: len(tokens) // BLOCK * BLOCK], busy)
        elif what == "trim":
            index.trim(slot, len(tokens) // 4)
            if slot in held:
                held[slot] = (held[slot][0], held[slot][1][: len(tokens) // 4 * BLOCK], held[slot][2])
        elif slot in held and held[slot][1]:
            index.use(slot)
            held[slot] = held.pop(slot)
        held = {name: entry for name, entry in held.items() if entry[1]}
    free = {name: entry for name, entry in held.items() if not entry[2]}
    assert [prefix.slot for prefix in index.free] == list(free)
    assert index.free_blocks == sum(len(entry[1]) for entry in free.values()) // BLOCK
    longest = {name: longest_common(asked, entry[1], BLOCK) for name, entry in held.items() if entry[0] == salt}
    best = max(longest.values(), default=0)
    found = find(index, asked, salt)
    if found is not None:
        assert longest[found[0]] >= found[1] > 0
    if hashed is not collides:  # a collision may hide a prefix
        assert (found[1] if found else 0) == best


def test_a_free_one_of_which_little_else_would_be_lost_is_preferred() -> None:
    index = PrefixIndex(BLOCK, keyed_hash(b"secret"))
    index.put(a_prefix(index, 0, [1, 2], held=True))
    index.put(a_prefix(index, 1, [1, 2, 3, 4, 5, 6]))
    index.put(a_prefix(index, 2, [1, 2, 3, 4]))
    assert find(index, [1, 2, 9, 9]) == (2, 2)
    assert find(index, [1, 2, 3, 4, 5, 6, 7, 8]) == (1, 6)


def test_digests_are_keyed_and_salted_and_stand_for_all_before() -> None:
    one, other = (PrefixIndex(BLOCK, keyed_hash(secret)) for secret in (b"one", b"other"))
    tokens = [1, 2, 3, 4]
    assert one.chain(b"", tokens, 2) != other.chain(b"", tokens, 2)
    assert not set(one.chain(b"a", tokens, 2)) & set(one.chain(b"b", tokens, 2))
    assert one.chain(b"", [1, 2, 3, 4], 2)[1] != one.chain(b"", [9, 2, 3, 4], 2)[1]
    whole = one.chain(b"", tokens, 2)
    assert one.chain(b"", tokens, 2, whole[:1]) == one.chain(b"", tokens, 2, whole) == whole
    assert one.chain(b"", tokens, 1, whole) == whole[:1]


def test_nothing_is_left_of_what_is_gone() -> None:
    index = PrefixIndex(BLOCK, keyed_hash(b"secret"))
    for slot in range(3):
        index.put(a_prefix(index, slot, range(20)))
    for slot in range(3):
        index.trim(slot, 3 - slot)
        index.trim(slot)
    assert (index.free, index.free_blocks, index._slots) == ([], 0, {})
