"""The KV pool on CPU: one shared memory file, a contiguous run of tokens per slot.

A gather of pages costs several times the attention itself on a CPU, so a request's keys and values lie in one piece and
SDPA reads them where they are. The file is sparse: a page costs memory once it is written. The service's front maps the
same file, sends from it and writes received KV straight into it.
"""

from __future__ import annotations

import mmap
import os

import torch

from baton.engine.layout import KvDtype, PoolLayout

TORCH_DTYPES = {KvDtype.FLOAT32: torch.float32, KvDtype.BFLOAT16: torch.bfloat16}


class Pool:
    """Memory of all slots, as tensors.

    Attributes:
        layout: where what lies.
        keys: per layer [num_slots, slot_tokens, heads, key_dim], views of the shared memory.
        values: per layer [num_slots, slot_tokens, heads, value_dim].

    Args:
        layout: of the pool.
        budget_bytes: memory that freed slots may keep for reuse together with what is held; beyond it, it goes back to
            the system.
        memory_fd: file to use, empty; -1: an own one. It is not closed here.
    """

    def __init__(self, layout: PoolLayout, budget_bytes: int, memory_fd: int = -1) -> None:
        self.layout = layout
        own = memory_fd < 0
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC) if own else memory_fd
        try:
            os.ftruncate(fd, layout.total_bytes)
            self.memory = mmap.mmap(fd, layout.total_bytes)
        finally:
            if own:
                os.close(fd)
        self._budget = budget_bytes
        self._token_bytes = layout.bytes_per_token
        self._touched = [0] * layout.num_slots  # tokens ever written since the slot's memory was given back
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        dtype = TORCH_DTYPES[layout.dtype]
        for layer, offsets in zip(layout.layers, layout.offsets, strict=True):
            for views, offset, dim in zip(
                (self.keys, self.values), offsets, (layer.key_dim, layer.value_dim), strict=True
            ):
                shape = (layout.num_slots, layout.slot_tokens, layer.heads, dim)
                count = layout.num_slots * layout.slot_tokens * layer.heads * dim
                views.append(torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape))

    @property
    def touched_bytes(self) -> int:
        """Memory that slots occupy, held or kept for reuse."""
        return sum(self._touched) * self._token_bytes

    def touch(self, slot: int, tokens: int) -> None:
        """Tokens [0, tokens) of the slot are about to be written."""
        self._touched[slot] = max(self._touched[slot], tokens)

    def release(self, slot: int, *, clean: bool, kept: int = 0) -> None:
        """The slot is free again.

        Args:
            slot: which.
            clean: whether what it holds is known to be finite. Attention reads past a short neighbour's last token and
                gives what it finds there weight 0, which does not help against NaN.
            kept: tokens [0, kept) are finite in any case, and stay.
        """
        if not clean or self.touched_bytes > self._budget:
            self._give_back(slot, kept)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Tokens [0, tokens) of slot `source` become those of slot `target`, in every layer."""
        self.touch(target, tokens)
        for tensor in (*self.keys, *self.values):
            tensor[target, :tokens] = tensor[source, :tokens]

    def finite(self, slot: int, start: int, stop: int) -> bool:
        """Whether the last layer's keys and values of tokens [start, stop) are.

        Where all was computed here, those of every layer are then: what is not finite stays so up to the last one.
        """
        parts = (tensor[slot, start:stop] for tensor in (self.keys[-1], self.values[-1]))
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def _give_back(self, slot: int, kept: int) -> None:
        """Forget what lies behind the first `kept` tokens."""
        tokens, self._touched[slot] = self._touched[slot], min(kept, self._touched[slot])
        if tokens <= kept:
            return
        for layer in range(len(self.layout.layers)):
            views = self.layout.rows(memoryview(self.memory), layer, slot, kept, tokens)
            bases = self.layout.offsets[layer]
            for view, base, size in zip(views, bases, self.layout.token_bytes(layer), strict=True):
                first = base + (slot * self.layout.slot_tokens + kept) * size
                self._clear(first, first + len(view))

    def _clear(self, start: int, stop: int) -> None:
        """Zero bytes [start, stop): whole pages go back to the system, the rest is overwritten."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first:
            self.memory[start:stop] = bytes(stop - start)
            return
        self.memory[start:first] = bytes(first - start)
        self.memory.madvise(mmap.MADV_REMOVE, first, last - first)
        self.memory[last:stop] = bytes(stop - last)
