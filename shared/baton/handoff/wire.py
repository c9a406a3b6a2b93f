"""What a KV chunk is on the wire: layer table, layout, checksum. See protos/baton/internal/v1/kv.proto."""

from __future__ import annotations

import xxhash

from baton.engine.layout import KvDtype, ModelSpec, PoolLayout
from baton.internal.v1 import kv_pb2

WIRE_VERSION = 1


class HandoffCorrupt(Exception):
    """Received KV is not what was sent. It is never used: another worker computes it."""


CHUNK_BYTES = 512 * 1024
"""Most KV bytes in one message: gRPC over loopback is fastest between 256 KiB and 1 MiB."""

_DTYPES = {
    KvDtype.FLOAT32: kv_pb2.KV_DTYPE_FLOAT32,
    KvDtype.BFLOAT16: kv_pb2.KV_DTYPE_BFLOAT16,
}


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
            )
            for layer in spec.layers
        ],
    )


def chunk_checksum(layer: int, start: int, data: bytes) -> int:
    """xxh3_64 of the data, seeded with its place: a chunk that lands elsewhere fails as well."""
    return xxhash.xxh3_64_intdigest(data, seed=(layer << 32) ^ start)


class StreamDigest:
    """Running digest over the checksums of all chunks of a handoff, in order."""

    __slots__ = ("_state", "bytes", "chunks")

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self.chunks = 0
        self.bytes = 0

    def add(self, chunk: kv_pb2.KvChunk) -> None:
        """Count one chunk."""
        self._state.update(chunk.checksum.to_bytes(8, "little"))
        self.chunks += 1
        self.bytes += len(chunk.data)

    def value(self) -> int:
        """The digest so far."""
        return self._state.intdigest()


def read_chunk(layout: PoolLayout, memory: memoryview, slot: int, layer: int, start: int, stop: int) -> kv_pb2.KvChunk:
    """Copy tokens [start, stop) of one layer and slot out of a pool, raw."""
    keys, values = layout.rows(memory, layer, slot, start, stop)
    data = b"".join((keys, values))
    return kv_pb2.KvChunk(
        layer=layer,
        start=start,
        tokens=stop - start,
        codec=kv_pb2.KV_CODEC_RAW,
        data=data,
        checksum=chunk_checksum(layer, start, data),
    )


def chunk_tokens(layout: PoolLayout, layer: int) -> int:
    """How many tokens of a layer fit one message, at least 1."""
    return max(1, CHUNK_BYTES // sum(layout.token_bytes(layer)))
