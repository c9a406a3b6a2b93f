"""What comes out of Redis is served only if it is whole and of the request that asks."""

from __future__ import annotations

import pytest

from baton.internal.v1 import response_cache_pb2
from baton_cache.value import CorruptValue, OtherVersion, decode, encode
from tests.cache.conftest import an_answer

PROOF = bytes(range(16))


def test_what_goes_in_comes_out() -> None:
    assert decode(encode(an_answer(), PROOF), PROOF) == an_answer()


def test_another_key_is_refused() -> None:
    with pytest.raises(CorruptValue, match="another key"):
        decode(encode(an_answer(), PROOF), PROOF[::-1])


def test_no_flipped_bit_is_served() -> None:
    value = encode(an_answer(), PROOF)
    caught = 0
    for position in range(len(value) * 8):
        broken = bytearray(value)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises((CorruptValue, OtherVersion)):
            decode(bytes(broken), PROOF)
        caught += 1
    assert caught > 500


def test_no_cut_is_served() -> None:
    value = encode(an_answer(), PROOF)
    for length in range(len(value)):
        with pytest.raises(CorruptValue):
            decode(value[:length], PROOF)


def test_a_later_version_is_not_ours_to_judge() -> None:
    stored = response_cache_pb2.StoredValue.FromString(encode(an_answer(), PROOF))
    stored.version = 2
    with pytest.raises(OtherVersion):
        decode(stored.SerializeToString(), PROOF)
