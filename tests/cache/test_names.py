"""Names tell entries and tenants apart, lie in one slot, and are nobody's guess."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from baton_cache.key import Keys
from baton_cache.names import Names, is_entry
from tests.cache.conftest import cache_key

ENTRY = Keys(b"").digests(cache_key()).name


@given(prefix=st.text().filter(lambda text: not {"{", "}"} & set(text)))
def test_all_names_of_an_entry_lie_in_one_slot(prefix: str) -> None:
    names = Names(prefix)
    all_of_them = [names.answer(ENTRY), names.lead(ENTRY), names.wanted(ENTRY), names.chunks(ENTRY)]
    assert len(set(all_of_them)) == 4
    assert len({key_slot(name.encode()) for name in all_of_them}) == 1
    assert names.entry(names.answer(ENTRY)) == ENTRY
    assert all(names.entry(name) is None for name in all_of_them[1:])
    assert all(map(names.ours, [*all_of_them, names.similar(ENTRY), names.question(ENTRY, ENTRY)]))
    assert not names.ours(Names(f"{prefix}other:").answer(ENTRY))


def test_what_is_no_answer_has_no_entry() -> None:
    names = Names("baton:")
    for name in (
        "",
        "baton:",
        "baton:answer:{}",
        "baton:answer:{x}",
        "answer:{" + ENTRY + "}",
        "baton:answer:" + ENTRY,
        "xbaton:answer:{" + ENTRY + "}",
    ):
        assert names.entry(name) is None, name
    assert not is_entry(ENTRY + "\n")


def test_entries_spread_over_slots() -> None:
    entries = [Keys(b"").digests(cache_key((i,))).name for i in range(300)]
    assert len({key_slot(Names("").answer(entry).encode()) for entry in entries}) > 250


def test_a_pattern_is_one_tenants() -> None:
    names, keys = Names("a*b:"), Keys(b"secret")
    pattern = names.tenant_pattern(keys.tenant_tag("one")).replace(r"\*", "[*]")
    assert fnmatchcase(names.answer(keys.digests(cache_key(tenant="one")).name), pattern)
    assert fnmatchcase(names.lead(keys.digests(cache_key(tenant="one")).name), pattern)
    assert not fnmatchcase(names.answer(keys.digests(cache_key(tenant="two")).name), pattern)
    assert not fnmatchcase(names.answer(keys.digests(cache_key(tenant="one")).name).replace("a*b", "axb"), pattern)


@pytest.mark.parametrize("other", [b"", b"secrets", b"s" * 100])
def test_names_are_keyed_with_the_secret(other: bytes) -> None:
    mine, theirs = Keys(b"secret"), Keys(other)
    assert mine.digests(cache_key()).name != theirs.digests(cache_key()).name
    assert mine.tenant_tag("one") != theirs.tenant_tag("one")


@given(secret=st.binary(max_size=100), one=st.text(), two=st.text())
def test_tenants_share_no_name(secret: bytes, one: str, two: str) -> None:
    keys = Keys(secret)
    of_one, of_two = (keys.digests(cache_key(tenant=tenant)).name for tenant in (one, two))
    assert is_entry(of_one)
    assert of_one.startswith(keys.tenant_tag(one) + "-")
    assert (of_one[:16] == of_two[:16]) == (of_one[17:] == of_two[17:]) == (one == two)
