"""Prefill's messages to bytes and back, with the KV copied once at most.

Protobuf's own way copies a chunk's data into the message, from there into the serialized one, out of it again, and once
more at each look. KV is nearly all there is to send, so its messages are put together and taken apart here. What is on
the wire is the same: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from baton.handoff.wire import Chunk
from baton.internal.v1 import kv_pb2, prefill_pb2

Message = prefill_pb2.PrefillResponse | Chunk

_CHUNK_TAG = prefill_pb2.PrefillResponse.CHUNK_FIELD_NUMBER << 3 | 2
_DATA_TAG = kv_pb2.KvChunk.DATA_FIELD_NUMBER << 3 | 2
_FIXED = {1: 8, 5: 4}  # bytes of a value, by wire type


def serialize(message: Message) -> bytes:
    """A message as it goes out."""
    if isinstance(message, prefill_pb2.PrefillResponse):
        return message.SerializeToString()
    header = message.header.SerializeToString()
    data_head = bytes((_DATA_TAG,)) + _varint(message.size)
    length = len(header) + len(data_head) + message.size
    return b"".join((bytes((_CHUNK_TAG,)), _varint(length), header, data_head, *message.parts))


def deserialize(raw: bytes) -> Message:
    """What came in. A chunk's data is a view of `raw`.

    Raises:
        google.protobuf.message.DecodeError: it is not a PrefillResponse.
    """
    if raw[:1] == bytes((_CHUNK_TAG,)) and (found := _data_at_the_end(raw)) is not None:
        body, data_tag, data = found
        return Chunk(kv_pb2.KvChunk.FromString(raw[body:data_tag]), (memoryview(raw)[data:],))
    message = prefill_pb2.PrefillResponse.FromString(raw)
    if message.WhichOneof("message") != "chunk":
        return message
    data_bytes = message.chunk.data
    message.chunk.ClearField("data")
    return Chunk(message.chunk, (data_bytes,))


def _data_at_the_end(raw: bytes) -> tuple[int, int, int] | None:
    """Where a chunk's body, its data's tag, and its data begin. None: the data are not the message's end."""
    try:
        length, at = _read_varint(raw, 1)
        if at + length != len(raw):
            return None
        body = at
        while at < len(raw):
            field = at
            tag, at = _read_varint(raw, at)
            if tag & 7 in _FIXED:
                at += _FIXED[tag & 7]
            elif tag & 7 in (0, 2):
                value, at = _read_varint(raw, at)
                if tag == _DATA_TAG:
                    return (body, field, at) if at + value == len(raw) else None
                at += value if tag & 7 == 2 else 0
            else:
                return None
    except IndexError:
        pass  # cut off; protobuf says how
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := raw[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1
