"""The receiving half of a handoff: check what comes, bring it into the slot, say when the KV is whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.engine.layout import PoolLayout
from baton.handoff import codec
from baton.handoff.wire import (
    Chunk,
    HandoffCorrupt,
    StreamDigest,
    chunk_checksum,
    first_moved,
    largest_chunk,
    moved_bytes,
    range_checksum,
)
from baton.internal.v1 import kv_pb2, prefill_pb2


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to read from the sender's pool into the own one; both places count from the beginning of a pool."""

    source: int
    target: int
    size: int


class KvReceiver:
    """Brings the KV of tokens [start_token, tokens) into a reserved slot. Accepts it in any order, each token once.

    What a layer's window or chunk hides from the token after the prompt does not come, and must not.
    Nothing it wrote counts until `verify` has returned: the caller commits only then.

    Args:
        layout, memory: of the pool that is written.
        slot: reserved in it.
        start_token, tokens: which.
        credit_bytes: KV bytes the sender may have under way; granted to it at the start.
        codecs: that were offered to the sender.
    """

    def __init__(
        self,
        layout: PoolLayout,
        memory: memoryview,
        slot: int,
        start_token: int,
        tokens: int,
        credit_bytes: int,
        codecs: tuple[codec.Codec, ...] = (kv_pb2.KV_CODEC_RAW,),
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._slot = slot
        self._start = start_token
        self._tokens = tokens
        self._codecs = codecs
        self._first = [first_moved(layout, layer, start_token, tokens) for layer in range(len(layout.layers))]
        self._token_bytes = [sum(layout.token_bytes(layer)) for layer in range(len(layout.layers))]
        self.total_bytes = moved_bytes(layout, start_token, tokens)
        self._first_credit = credit_bytes
        self._largest = largest_chunk(layout)
        self.restart()

    def restart(self) -> None:
        """Forget what came: all of it comes again."""
        self._have = np.zeros((len(self._layout.layers), self._tokens - self._start), dtype=np.bool_)
        for layer, first in enumerate(self._first):
            self._have[layer, : first - self._start] = True
        self._digest = StreamDigest()
        self._missing = self.total_bytes
        self._credit = self._first_credit

    @property
    def all_granted(self) -> bool:
        """The sender has credit for everything still to come."""
        return self._credit >= self._missing

    @property
    def whole(self) -> bool:
        """Everything is here, though not verified."""
        return not self._missing

    @property
    def received_bytes(self) -> int:
        """KV bytes received so far, as they came."""
        return self._digest.bytes

    def accept(self, chunk: Chunk) -> int:
        """Check one chunk and write it into the slot.

        Returns:
            Bytes to grant to the sender now: those of some chunks, as long as more than the credit is still to come.

        Raises:
            HandoffCorrupt: wrong place, size, codec or checksum, or tokens that were already here.
        """
        header = chunk.header
        layer, start, stop = header.layer, header.start, header.start + header.tokens
        self._check_place(layer, start, stop)
        if header.codec not in self._codecs:
            raise HandoffCorrupt(f"KV chunk has codec {header.codec}, which was not offered")
        size = codec.data_size(header.codec, self._layout, layer, stop - start)
        if chunk.size != size:
            raise HandoffCorrupt(f"KV chunk has {chunk.size} bytes, its shape implies {size}")
        if chunk_checksum(layer, start, chunk.parts) != header.checksum:
            raise HandoffCorrupt(f"KV chunk of layer {layer}, tokens [{start}, {stop}) fails its checksum")
        data = memoryview(chunk.parts[0] if len(chunk.parts) == 1 else b"".join(chunk.parts))
        if header.codec == kv_pb2.KV_CODEC_RAW:
            keys, values = self._layout.rows(self._memory, layer, self._slot, start, stop)
            keys[:] = data[: len(keys)]
            values[:] = data[len(keys) :]
        else:
            codec.decode_int8(self._layout, self._memory, layer, self._slot, start, stop, data)
        self._took(layer, start, stop, header.checksum, size)
        self._credit -= size
        # Not a message for every chunk; but the sender can always send its largest one.
        owed = self._first_credit - self._credit
        if owed < self._first_credit // 2 and self._credit >= self._largest:
            return 0
        granted = min(owed, max(0, self._missing - self._credit))
        self._credit += granted
        return granted

    def pieces(self, item: kv_pb2.KvRange) -> list[Piece]:
        """What to read for a range; call `took` when it is read.

        Raises:
            HandoffCorrupt: wrong place, or tokens that were already here.
        """
        start, stop = item.start, item.start + item.tokens
        self._check_place(item.layer, start, stop)
        spans = self._layout.spans(item.layer, self._slot, start, stop)
        sources = (item.key_offset, item.value_offset)
        return [Piece(source, target, size) for source, (target, size) in zip(sources, spans, strict=True)]

    def took(self, item: kv_pb2.KvRange) -> None:
        """A range was read into the slot."""
        start, stop = item.start, item.start + item.tokens
        size = self._token_bytes[item.layer] * item.tokens
        self._took(item.layer, start, stop, range_checksum(item), size)

    def verify(self, done: prefill_pb2.Done) -> None:
        """Check that all that was sent arrived, and that it is all that is needed.

        Raises:
            HandoffCorrupt: something is missing or the sender counted otherwise.
        """
        sent = (done.chunks, done.bytes, done.checksum)
        if sent != (self._digest.chunks, self._digest.bytes, self._digest.value()):
            raise HandoffCorrupt("the KV received is not the KV sent")
        if not self._have.all():
            raise HandoffCorrupt(f"KV of {int((~self._have).sum())} layer-tokens never came")

    def _check_place(self, layer: int, start: int, stop: int) -> None:
        inside = layer < len(self._first) and self._first[layer] <= start < stop <= self._tokens
        if not inside:
            raise HandoffCorrupt(f"KV of layer {layer}, tokens [{start}, {stop}) is outside the request")
        if self._have[layer, start - self._start : stop - self._start].any():
            raise HandoffCorrupt(f"KV of layer {layer}, tokens [{start}, {stop}) came twice")

    def _took(self, layer: int, start: int, stop: int, checksum: int, size: int) -> None:
        self._have[layer, start - self._start : stop - self._start] = True
        self._missing -= self._token_bytes[layer] * (stop - start)
        self._digest.add(checksum, size)
