"""The receiving half of a handoff: verify each chunk, write it into the slot, say when the KV is whole."""

from __future__ import annotations

import numpy as np

from baton.engine.layout import PoolLayout
from baton.handoff.wire import HandoffCorrupt, StreamDigest, chunk_checksum
from baton.internal.v1 import kv_pb2, prefill_pb2


class KvReceiver:
    """Writes the KV of tokens [start_token, tokens) into a reserved slot. Accepts chunks in any order, each token once.

    Nothing it wrote counts until `verify` has returned: the caller commits only then.

    Args:
        layout, memory: of the pool that is written.
        slot: reserved in it.
        start_token, tokens: which.
        credit_bytes: KV bytes the sender may have under way; granted to it at the start.
    """

    def __init__(
        self, layout: PoolLayout, memory: memoryview, slot: int, start_token: int, tokens: int, credit_bytes: int
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._slot = slot
        self._start = start_token
        self._tokens = tokens
        self._have = np.zeros((len(layout.layers), tokens - start_token), dtype=np.bool_)
        self._digest = StreamDigest()
        self._ungranted = max(0, layout.bytes_per_token * (tokens - start_token) - credit_bytes)

    @property
    def all_granted(self) -> bool:
        """The sender has credit for everything still to come."""
        return not self._ungranted

    @property
    def received_bytes(self) -> int:
        """KV bytes received so far."""
        return self._digest.bytes

    def accept(self, chunk: kv_pb2.KvChunk) -> int:
        """Check one chunk and copy it into the slot.

        Returns:
            Bytes to grant to the sender for it: its own, as long as more than the credit is still to come.

        Raises:
            HandoffCorrupt: wrong place, size, codec or checksum, or tokens that were already here.
        """
        layer, start, stop = chunk.layer, chunk.start, chunk.start + chunk.tokens
        if layer >= len(self._layout.layers) or start < self._start or stop > self._tokens or start >= stop:
            raise HandoffCorrupt(f"KV chunk of layer {layer}, tokens [{start}, {stop}) is outside the request")
        if chunk.codec != kv_pb2.KV_CODEC_RAW:
            raise HandoffCorrupt(f"KV chunk has codec {chunk.codec}, which was not offered")
        keys, values = self._layout.rows(self._memory, layer, self._slot, start, stop)
        data = chunk.data
        if len(data) != len(keys) + len(values):
            raise HandoffCorrupt(f"KV chunk has {len(data)} bytes, its shape implies {len(keys) + len(values)}")
        if chunk_checksum(layer, start, data) != chunk.checksum:
            raise HandoffCorrupt(f"KV chunk of layer {layer}, tokens [{start}, {stop}) fails its checksum")
        have = self._have[layer, start - self._start : stop - self._start]
        if have.any():
            raise HandoffCorrupt(f"KV chunk of layer {layer}, tokens [{start}, {stop}) came twice")
        view = memoryview(data)
        keys[:] = view[: len(keys)]
        values[:] = view[len(keys) :]
        have[:] = True
        self._digest.add(chunk)
        granted = min(len(data), self._ungranted)
        self._ungranted -= granted
        return granted

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
