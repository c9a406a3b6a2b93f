"""Shape of a model's KV cache and where it lies in a pool's memory. Plain data and numpy; no torch, no gRPC."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np


class KvDtype(enum.StrEnum):
    """Element type of cached keys and values."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is KvDtype.FLOAT32 else 2


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One KV-holding attention call of the model, in call order."""

    key: str  # unique name, e.g. "0" or "3.1" (layer 3, second call)
    heads: int  # KV heads
    key_dim: int
    value_dim: int
    window: int = 0  # sliding-window length in tokens; 0 = full attention
    chunk: int = 0  # chunked-attention length in tokens (llama4); 0 = none

    def first_seen(self, position: int) -> int:
        """The first token that the one at `position` attends to."""
        if self.window:
            return max(0, position - self.window + 1)
        if self.chunk:
            return position // self.chunk * self.chunk
        return 0


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a service must know of a loaded model. `fingerprint` is equal exactly when workers are interchangeable."""

    name: str
    architecture: str
    fingerprint: str  # hex digest over configuration, weights, dtype and end-of-sequence tokens
    tokenizer_digest: str  # hex digest of tokenizer.json; empty when the directory has none
    vocab_size: int
    max_context: int  # tokens, prompt plus output
    eos_token_ids: tuple[int, ...]
    dtype: KvDtype
    layers: tuple[LayerSpec, ...]


class PoolLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Byte layout of a slot-major pool in one shared memory file.

    Per layer, K then V, each `[num_slots, slot_tokens, heads, dim]`, C order, native endian; `offsets[layer]` is
    (byte offset of K, byte offset of V). A slot's tokens are contiguous, so tokens [a, b) of one layer and slot are
    one run of bytes: exactly the wire layout of a KV chunk.
    """

    num_slots: int
    slot_tokens: int
    dtype: KvDtype
    layers: tuple[LayerSpec, ...]
    offsets: tuple[tuple[int, int], ...]
    total_bytes: int

    @classmethod
    def build(cls, layers: tuple[LayerSpec, ...], dtype: KvDtype, num_slots: int, slot_tokens: int) -> PoolLayout:
        """Lay the layers out one after another, each part aligned to 4096 bytes."""
        offsets: list[tuple[int, int]] = []
        end = 0
        for layer in layers:
            pair = []
            for dim in (layer.key_dim, layer.value_dim):
                pair.append(end)
                size = num_slots * slot_tokens * layer.heads * dim * dtype.itemsize
                end += -(-size // 4096) * 4096
            offsets.append((pair[0], pair[1]))
        return cls(
            num_slots=num_slots,
            slot_tokens=slot_tokens,
            dtype=dtype,
            layers=layers,
            offsets=tuple(offsets),
            total_bytes=end,
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return sum(sum(self.token_bytes(layer)) for layer in range(len(self.layers)))

    def token_bytes(self, layer: int) -> tuple[int, int]:
        """Bytes of one token's K and of one token's V in `layer`."""
        la = self.layers[layer]
        return la.heads * la.key_dim * self.dtype.itemsize, la.heads * la.value_dim * self.dtype.itemsize

    def spans(self, layer: int, slot: int, start: int, stop: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where K and V of tokens [start, stop) of a slot lie in the pool: for each, first byte and number of bytes.

        Raises:
            IndexError: layer, slot or token range outside the pool.
        """
        if not (
            0 <= layer < len(self.layers) and 0 <= slot < self.num_slots and 0 <= start <= stop <= self.slot_tokens
        ):
            raise IndexError(f"layer {layer}, slot {slot}, tokens [{start}, {stop}) are outside the pool")
        row = slot * self.slot_tokens + start
        (keys, values), (key_bytes, value_bytes) = self.offsets[layer], self.token_bytes(layer)
        return (
            (keys + row * key_bytes, (stop - start) * key_bytes),
            (values + row * value_bytes, (stop - start) * value_bytes),
        )

    def rows(self, buffer: memoryview, layer: int, slot: int, start: int, stop: int) -> tuple[memoryview, memoryview]:
        """K and V bytes of tokens [start, stop) of a slot, as views of the pool's memory.

        Raises:
            IndexError: as `spans`.
        """
        (keys, key_bytes), (values, value_bytes) = self.spans(layer, slot, start, stop)
        return buffer[keys : keys + key_bytes], buffer[values : values + value_bytes]

    def array(self, buffer: memoryview, layer: int, slot: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As `rows`, shaped `[tokens, heads, dim]`; bfloat16 comes as its raw uint16 bits."""
        import numpy as np

        kind = np.float32 if self.dtype is KvDtype.FLOAT32 else np.uint16
        la = self.layers[layer]
        k, v = self.rows(buffer, layer, slot, start, stop)
        return (
            np.frombuffer(k, kind).reshape(-1, la.heads, la.key_dim),
            np.frombuffer(v, kind).reshape(-1, la.heads, la.value_dim),
        )
