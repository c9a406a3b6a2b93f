"""What comes out of Redis is served only if it is whole and of the request that asks."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.internal.v1 import response_cache_pb2
from baton.v1 import sampling_pb2
from baton_cache.value import OVERHEAD, VERSION, CorruptValue, OtherVersion, TooLarge, decode, encode
from tests.cache.conftest import an_answer

PROOF = bytes(range(16))
MOST = 1024 * 1024
SMALL, LARGE = an_answer(), an_answer("the quick brown fox ", chunks=100)

PROOFS = st.binary(min_size=16, max_size=16)
ANSWERS = st.builds(
    response_cache_pb2.CachedAnswer,
    chunks=st.lists(
        st.builds(
            response_cache_pb2.CachedChunk,
            token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4),
            text=st.text(max_size=40),
            since_start_us=st.integers(0, 2**63),
        ),
        max_size=40,
    ),
    finish_reason=st.sampled_from([1, 2, 3]),
    usage=st.builds(sampling_pb2.Usage, prompt_tokens=st.integers(0, 2**31)),
)


@given(ANSWERS, PROOFS)
def test_what_goes_in_comes_out(answer: response_cache_pb2.CachedAnswer, proof: bytes) -> None:
    value = encode(answer, proof, MOST)
    assert decode(value, proof, MOST) == answer
    assert len(value) <= answer.ByteSize() + OVERHEAD


@given(ANSWERS, PROOFS, PROOFS)
def test_another_key_is_refused(answer: response_cache_pb2.CachedAnswer, proof: bytes, other: bytes) -> None:
    if proof != other:
        with pytest.raises(CorruptValue, match="another key"):
            decode(encode(answer, proof, MOST), other, MOST)


@given(ANSWERS, PROOFS, st.data())
def test_no_changed_byte_is_served(answer: response_cache_pb2.CachedAnswer, proof: bytes, data: st.DataObject) -> None:
    broken = bytearray(encode(answer, proof, MOST))
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((CorruptValue, OtherVersion)):
        decode(bytes(broken), proof, MOST)


@pytest.mark.parametrize("answer", [SMALL, LARGE], ids=["plain", "compressed"])
def test_no_flipped_bit_is_served(answer: response_cache_pb2.CachedAnswer) -> None:
    value = encode(answer, PROOF, MOST)
    caught = 0
    for position in range(len(value) * 8):
        broken = bytearray(value)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises((CorruptValue, OtherVersion)):
            decode(bytes(broken), PROOF, MOST)
        caught += 1
    assert caught > 500


@pytest.mark.parametrize("answer", [SMALL, LARGE], ids=["plain", "compressed"])
def test_no_cut_is_served(answer: response_cache_pb2.CachedAnswer) -> None:
    value = encode(answer, PROOF, MOST)
    for length in range(len(value)):
        with pytest.raises(CorruptValue):
            decode(value[:length], PROOF, MOST)


@pytest.mark.parametrize("version", [1, VERSION + 1])
def test_another_version_is_not_ours_to_judge(version: int) -> None:
    stored = response_cache_pb2.StoredValue.FromString(encode(an_answer(), PROOF, MOST))
    stored.version = version
    with pytest.raises(OtherVersion):
        decode(stored.SerializeToString(), PROOF, MOST)


def test_large_answers_are_compressed() -> None:
    assert len(encode(LARGE, PROOF, MOST)) < LARGE.ByteSize() / 2
    assert len(encode(SMALL, PROOF, MOST)) > SMALL.ByteSize()


def test_the_limit_is_of_the_answer() -> None:
    size = LARGE.ByteSize()
    value = encode(LARGE, PROOF, size)
    assert decode(value, PROOF, size) == LARGE
    with pytest.raises(TooLarge):
        encode(LARGE, PROOF, size - 1)
    with pytest.raises(TooLarge):
        decode(value, PROOF, size - 1)


def bomb(size: int, says: int) -> bytes:
    """A value whose answer is many zeros, and says that it is of another size."""
    data = zlib.compress(bytes(size), 9)
    return response_cache_pb2.StoredValue(
        version=VERSION,
        key_digest=PROOF,
        answer=data,
        checksum=xxhash.xxh3_64_intdigest(data, seed=says << 8 | 1),
        compression=response_cache_pb2.VALUE_COMPRESSION_ZLIB,
        answer_bytes=says,
    ).SerializeToString()


@pytest.mark.parametrize("says", [1000, MOST, 2**32 - 1])
def test_a_bomb_does_not_go_off(says: int) -> None:
    value = bomb(200 * MOST, says)
    tracemalloc.start()
    try:
        with pytest.raises((CorruptValue, TooLarge)):
            decode(value, PROOF, MOST)
        assert tracemalloc.get_traced_memory()[1] < 4 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("says", [999, 1001])
def test_an_answer_of_another_size_than_it_says_is_refused(says: int) -> None:
    with pytest.raises(CorruptValue):
        decode(bomb(1000, says), PROOF, MOST)
