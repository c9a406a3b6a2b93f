"""What lies in Redis: an answer with what proves that it is whole, and the right one. Pure."""

from __future__ import annotations

from typing import Final

import xxhash
from google.protobuf.message import DecodeError

from baton.internal.v1 import response_cache_pb2

VERSION: Final = 1


class CorruptValue(Exception):
    """The stored value is broken, or of another request."""


class OtherVersion(Exception):
    """The stored value is of a later version of Baton, which may still want it."""


def encode(answer: response_cache_pb2.CachedAnswer, proof: bytes) -> bytes:
    """The value of an answer.

    Args:
        answer: what to store.
        proof: digest of its key.
    """
    data = answer.SerializeToString()
    return response_cache_pb2.StoredValue(
        version=VERSION, key_digest=proof, answer=data, checksum=xxhash.xxh3_64_intdigest(data)
    ).SerializeToString()


def decode(value: bytes, proof: bytes) -> response_cache_pb2.CachedAnswer:
    """The answer of a value.

    Args:
        value: as it was read.
        proof: digest of the key it was read for.

    Raises:
        CorruptValue: it is broken, or of another key.
        OtherVersion: it is not for us.
    """
    try:
        stored = response_cache_pb2.StoredValue.FromString(value)
    except DecodeError:
        raise CorruptValue("not a stored value") from None
    if stored.version > VERSION:
        raise OtherVersion(f"version {stored.version}")
    if stored.version < VERSION:
        raise CorruptValue("no version")
    if stored.key_digest != proof:
        raise CorruptValue("of another key")
    if stored.checksum != xxhash.xxh3_64_intdigest(stored.answer):
        raise CorruptValue("wrong checksum")
    try:
        return response_cache_pb2.CachedAnswer.FromString(stored.answer)
    except DecodeError:
        raise CorruptValue("not an answer") from None
