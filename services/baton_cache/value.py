"""What lies in Redis: an answer with what proves that it is whole, and the right one. Pure."""

from __future__ import annotations

import zlib
from typing import Final

import xxhash
from google.protobuf.message import DecodeError

from baton.internal.v1 import response_cache_pb2

VERSION: Final = 2
OVERHEAD: Final = 64
"""Bytes, at most, that a value has on top of its answer."""

# Measured on answers of 8 to 16,000 tokens, one a chunk: below 1 KiB less than a quarter is saved; level 6 saves 2 to 4
# points more than level 1 and takes 2 to 3.5 times as long.
_WORTH_COMPRESSING: Final = 1024
_LEVEL: Final = 1

_PLAIN: Final = response_cache_pb2.VALUE_COMPRESSION_UNSPECIFIED
_ZLIB: Final = response_cache_pb2.VALUE_COMPRESSION_ZLIB


class CorruptValue(Exception):
    """The stored value is broken, or of another request."""


class OtherVersion(Exception):
    """The stored value is of another version of Baton, which may still want it."""


class TooLarge(Exception):
    """The answer is larger than it may be."""


def encode(answer: response_cache_pb2.CachedAnswer, proof: bytes, most_bytes: int) -> bytes:
    """The value of an answer.

    Args:
        answer: what to store.
        proof: digest of its key.
        most_bytes: of the serialized answer.

    Raises:
        TooLarge: it has more.
    """
    size = answer.ByteSize()
    if size > most_bytes:
        raise TooLarge(f"{size} bytes")
    data, compression = answer.SerializeToString(), _PLAIN
    if size >= _WORTH_COMPRESSING:
        compressed = zlib.compress(data, _LEVEL)
        if len(compressed) < size:
            data, compression = compressed, _ZLIB
    return response_cache_pb2.StoredValue(
        version=VERSION,
        key_digest=proof,
        answer=data,
        checksum=_checksum(data, size, compression),
        compression=compression,
        answer_bytes=size,
    ).SerializeToString()


def decode(value: bytes, proof: bytes, most_bytes: int) -> response_cache_pb2.CachedAnswer:
    """The answer of a value.

    Args:
        value: as it was read.
        proof: digest of the key it was read for.
        most_bytes: of the serialized answer: no more is allocated, whatever the value says.

    Raises:
        CorruptValue: it is broken, or of another key.
        OtherVersion: it is not for us.
        TooLarge: it is over the limit.
    """
    stored = _parse(value)
    if stored.key_digest != proof:
        raise CorruptValue("of another key")
    return _answer(stored, most_bytes)


def inspect(value: bytes, most_bytes: int) -> response_cache_pb2.CachedAnswer:
    """The answer of a value, whichever key it is of. Errors as of `decode`."""
    return _answer(_parse(value), most_bytes)


def _parse(value: bytes) -> response_cache_pb2.StoredValue:
    try:
        stored = response_cache_pb2.StoredValue.FromString(value)
    except DecodeError:
        raise CorruptValue("not a stored value") from None
    if not stored.version:
        raise CorruptValue("no version")
    if stored.version != VERSION:
        raise OtherVersion(f"version {stored.version}")
    return stored


def _answer(stored: response_cache_pb2.StoredValue, most_bytes: int) -> response_cache_pb2.CachedAnswer:
    if stored.checksum != _checksum(stored.answer, stored.answer_bytes, stored.compression):
        raise CorruptValue("wrong checksum")
    if stored.answer_bytes > most_bytes:
        raise TooLarge(f"{stored.answer_bytes} bytes")
    data = stored.answer
    if stored.compression == _ZLIB:
        data = _decompress(data, stored.answer_bytes)
    elif stored.compression != _PLAIN:
        raise OtherVersion(f"compression {stored.compression}")
    if len(data) != stored.answer_bytes:
        raise CorruptValue("of another size than it says")
    try:
        return response_cache_pb2.CachedAnswer.FromString(data)
    except DecodeError:
        raise CorruptValue("not an answer") from None


def _decompress(data: bytes, size: int) -> bytes:
    """What was compressed. One byte beyond `size` is allocated at most."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, size + 1)
    except zlib.error:
        raise CorruptValue("not compressed") from None
    if not stream.eof or stream.unused_data:
        raise CorruptValue("ends elsewhere than it says")
    return plain


def _checksum(data: bytes, size: int, compression: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=size << 8 | compression & 0xFF)
