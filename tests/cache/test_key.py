"""Two requests share an entry only if nothing that an answer depends on differs, and then always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from baton.internal.v1 import response_cache_pb2
from baton.v1 import sampling_pb2
from baton_cache.key import Keys, canonical, has_unknown_fields
from tests.cache.conftest import cache_key

digests = Keys(b"").digests
SAMPLING = sampling_pb2.SamplingParams.DESCRIPTOR
KEY = response_cache_pb2.CacheKey.DESCRIPTOR

Change = Callable[[Message], None]


def changes(field: FieldDescriptor) -> list[Change]:
    """Ways to give a field another value; all of them differ. Fails for a kind of field it does not know."""

    def put(value: Any) -> Change:
        return lambda message: setattr(message, field.name, value)

    def fill(*values: Any) -> Change:
        return lambda message: (message.ClearField(field.name), getattr(message, field.name).extend(values))[0]

    def map_to(entries: dict[int, float]) -> Change:
        return lambda message: (message.ClearField(field.name), getattr(message, field.name).update(entries))[0]

    if field.name == "logit_bias":
        return [map_to({1: 2.0}), map_to({1: 3.0}), map_to({2: 2.0}), map_to({1: 2.0, 2: 2.0})]
    numbers = {
        FieldDescriptor.TYPE_UINT32: (1, 2, 256, 2**32 - 1),
        FieldDescriptor.TYPE_UINT64: (1, 2, 256, 2**64 - 1),
        FieldDescriptor.TYPE_FLOAT: (0.5, 0.50001, 1.5),
        FieldDescriptor.TYPE_BOOL: (True, False),
        FieldDescriptor.TYPE_STRING: ("a", "b", "ab", "\0"),
    }
    assert field.type in numbers, f"say how {field.full_name} can vary"
    values = numbers[field.type]
    if not field.is_repeated:
        return [put(value) for value in values]
    return [fill(*values), fill(*reversed(values)), *(fill(value) for value in values)]


def variants(descriptor: Descriptor, part: Callable[[response_cache_pb2.CacheKey], Message]) -> dict[str, Any]:
    """Keys that differ from each other in one field of `part`, by what was done."""
    found = {}
    for field in descriptor.fields:
        if field.full_name == "baton.internal.v1.CacheKey.sampling":
            continue
        base = cache_key(temperature=0.7, seed=77)
        part(base).ClearField(field.name)
        found[f"no {field.name}"] = base
        for index, change in enumerate(changes(field)):
            key = response_cache_pb2.CacheKey()
            key.CopyFrom(base)
            change(part(key))
            found[f"{field.name} {index}"] = key
    return found


@pytest.mark.parametrize("field", [field.name for field in SAMPLING.fields])
def test_every_sampling_field_changes_the_key(field: str) -> None:
    ours = {name: key for name, key in variants(SAMPLING, lambda key: key.sampling).items() if field in name.split(" ")}
    assert len(ours) >= 3
    for digest in (lambda key: digests(key).name, lambda key: digests(key).proof):
        assert len({digest(key) for key in ours.values()}) == len(ours)


def test_every_field_changes_the_key() -> None:
    keys = variants(SAMPLING, lambda key: key.sampling) | variants(KEY, lambda key: key)
    different: list[response_cache_pb2.CacheKey] = []
    for key in keys.values():
        if key not in different:  # the unchanged key is a variant of many fields
            different.append(key)
    assert len(different) > 2 * (len(SAMPLING.fields) + len(KEY.fields))
    assert len({digests(key).name for key in different}) == len(different)
    assert len({digests(key).proof for key in different}) == len(different)


def test_unset_is_not_the_default() -> None:
    for field in SAMPLING.fields:
        if field.has_presence:
            unset, zero = cache_key(), cache_key()
            unset.sampling.ClearField(field.name)
            setattr(zero.sampling, field.name, field.default_value)
            assert digests(unset).name != digests(zero).name, field.name


def test_the_order_of_a_map_does_not_matter() -> None:
    tokens = [i * 7919 % 100_003 for i in range(50)]
    there, back = cache_key(), cache_key()
    there.sampling.logit_bias.update(dict.fromkeys(tokens, 0.5))
    # A map that was larger once keeps its table, so the same entries come out in another order.
    back.sampling.logit_bias.update(dict.fromkeys(range(200_000, 201_000), 1.0))
    back.sampling.logit_bias.update(dict.fromkeys(reversed(tokens), 0.5))
    for token in range(200_000, 201_000):
        del back.sampling.logit_bias[token]
    assert there == back
    assert list(there.sampling.logit_bias) != list(back.sampling.logit_bias)
    assert digests(there) == digests(back)


def test_borders_between_tokens_and_texts_matter() -> None:
    assert digests(cache_key((1, 23))).name != digests(cache_key((12, 3))).name
    assert digests(cache_key((1, 0))).name != digests(cache_key((1,))).name
    assert digests(cache_key((1, 256))).name != digests(cache_key((257,))).name
    assert digests(cache_key(stop=["ab", "c"])).name != digests(cache_key(stop=["a", "bc"])).name
    assert digests(cache_key(stop=["a", ""])).name != digests(cache_key(stop=["a"])).name
    assert digests(cache_key((1, 2), stop_token_ids=[3])).name != digests(cache_key((1,), stop_token_ids=[2, 3])).name


KEYS = st.builds(
    response_cache_pb2.CacheKey,
    tenant=st.text(max_size=3),
    model_fingerprint=st.text(max_size=3),
    text_digest=st.text(max_size=3),
    token_ids=st.lists(st.integers(0, 3), max_size=3),
    sampling=st.builds(
        sampling_pb2.SamplingParams,
        max_tokens=st.none() | st.integers(0, 2),
        temperature=st.none() | st.sampled_from([0.0, 1.0]),
        logit_bias=st.dictionaries(st.integers(0, 2), st.sampled_from([0.0, 1.0]), max_size=2),
        seed=st.none() | st.integers(0, 2),
        stop=st.lists(st.text("ab", max_size=2), max_size=3),
        stop_token_ids=st.lists(st.integers(0, 3), max_size=2),
        ignore_eos=st.none() | st.booleans(),
    ),
)


@given(KEYS, KEYS)
def test_same_form_only_for_same_keys(one: response_cache_pb2.CacheKey, other: response_cache_pb2.CacheKey) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)


def test_the_form_is_pinned() -> None:
    """Entries outlive a restart, so another form needs another version in its domain."""
    key = cache_key((1, 2, 3), tenant="t", temperature=0.5, seed=9, logit_bias={4: 1.0}, stop=["x"])
    assert digests(key).name == ("700bc80026db41e9-fe16fd05366be6ea281365804487e7df028956e879298665e687e15a69102e2f")
    assert digests(key).proof.hex() == "6381a6cba5518b07f745990baff02025"


def test_tenants_have_names_of_their_own() -> None:
    assert digests(cache_key(tenant="a")).name != digests(cache_key(tenant="b")).name


def test_fields_of_a_later_version_are_noticed() -> None:
    field_100 = b"\xa0\x06\x01"
    assert not has_unknown_fields(cache_key())
    assert has_unknown_fields(response_cache_pb2.CacheKey.FromString(cache_key().SerializeToString() + field_100))
    inner = cache_key()
    inner.sampling.MergeFromString(field_100)
    assert has_unknown_fields(inner)
