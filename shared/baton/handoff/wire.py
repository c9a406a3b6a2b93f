"""What moves in a handoff and how it is checked: layer table, chunks, ranges. See protos/baton/internal/v1/kv.proto."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from baton.engine.layout import KvDtype, ModelSpec, PoolLayout
from baton.internal.v1 import kv_pb2

WIRE_VERSION = 2


class HandoffCorrupt(Exception):
    """Received KV is not what was sent. It is never used: another worker computes it."""


CHUNK_BYTES = 512 * 1024
"""Most KV bytes in one message, uncoded. docs/handoff.md has the measurement."""

_DTYPES = {
    KvDtype.FLOAT32: kv_pb2.KV_DTYPE_FLOAT32,
    KvDtype.BFLOAT16: kv_pb2.KV_DTYPE_BFLOAT16,
}
_PLACE = struct.Struct("<5Q")


def layer_table(spec: ModelSpec) -> kv_pb2.LayerTable:
    """The table both tiers compare before bytes move."""
    return kv_pb2.LayerTable(
        dtype=_DTYPES[spec.dtype],
        layers=[
            kv_pb2.Layer(
                key=layer.key,
                kind=kv_pb2.LAYER_KIND_KV,
                heads=layer.heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                window=layer.window,
                chunk=layer.chunk,
            )
            for layer in spec.layers
        ],
    )


def first_moved(layout: PoolLayout, layer: int, start_token: int, tokens: int) -> int:
    """The first token of a layer that moves, of a prompt of `tokens` of which the receiver has [0, start_token).

    The token after the prompt is the first that the receiver computes, so nothing before its window is ever read there.
    """
    return min(tokens, max(start_token, layout.layers[layer].first_seen(tokens)))


def moved_bytes(layout: PoolLayout, start_token: int, tokens: int) -> int:
    """KV bytes that move, uncoded, of a prompt of `tokens` of which the receiver has [0, start_token)."""
    return sum(
        sum(layout.token_bytes(layer)) * (tokens - first_moved(layout, layer, start_token, tokens))
        for layer in range(len(layout.layers))
    )


@dataclass(slots=True)
class Chunk:
    """A KvChunk whose data stays where it is: in the pool, or in the message it came in.

    Attributes:
        header: everything but the data.
        parts: the data, in pieces that follow one another.
    """

    header: kv_pb2.KvChunk
    parts: Sequence[bytes | memoryview]

    @property
    def size(self) -> int:
        """Bytes of data."""
        return sum(len(part) for part in self.parts)


def chunk_checksum(layer: int, start: int, parts: Sequence[bytes | memoryview]) -> int:
    """xxh3_64 of the data, seeded with its place: a chunk that lands elsewhere fails as well."""
    state = xxhash.xxh3_64(seed=(layer << 32) ^ start)
    for part in parts:
        state.update(part)
    return state.intdigest()


def range_checksum(item: kv_pb2.KvRange) -> int:
    """xxh3_64 of what a range says."""
    place = _PLACE.pack(item.layer, item.start, item.tokens, item.key_offset, item.value_offset)
    return xxhash.xxh3_64_intdigest(place)


class StreamDigest:
    """Running digest over the checksums of all chunks and ranges of a handoff, in order."""

    __slots__ = ("_state", "bytes", "chunks")

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self.chunks = 0
        self.bytes = 0

    def add(self, checksum: int, size: int) -> None:
        """Count one chunk or range of `size` bytes."""
        self._state.update(checksum.to_bytes(8, "little"))
        self.chunks += 1
        self.bytes += size

    def value(self) -> int:
        """The digest so far."""
        return self._state.intdigest()


def chunk_tokens(layout: PoolLayout, layer: int) -> int:
    """How many tokens of a layer fit one message, at least 1."""
    return max(1, CHUNK_BYTES // sum(layout.token_bytes(layer)))


def largest_chunk(layout: PoolLayout) -> int:
    """Bytes of the largest chunk there can be: the least credit that lets every chunk go."""
    return max(sum(layout.token_bytes(i)) * chunk_tokens(layout, i) for i in range(len(layout.layers)))
