"""The attention calls of one step: write new keys and values into the pool, attend over what lies there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from baton.engine.attention import Call, attend
from baton.engine.kernels.block import BlockKernel
from baton.engine.kernels.decode import DecodeKernel
from baton.engine.kernels.flash import FlashKernel
from baton.engine.layout import LayerSpec
from baton.engine.pool import Pool
from baton.engine.scheduler import Work
from baton.engine.segments import Chunk, DecodeGroup, decode_groups


class Step:
    """Packed rows of one step: decoding requests first, one row each, by slot; prompt chunks after.

    Args:
        pool: where keys and values lie.
        work: what to compute.
        on_layer: called with the layer's number when all of the step's keys and values of it lie in the pool.
        kernel: for all rows, or for those of one token; None: torch's own attention.

    Attributes:
        work: the given work, in the order of its rows.
        input_ids: int64 [1, rows].
        position_ids: int64 [1, rows].
        sampled: int64, the last row of every work that samples, in order of `work`.
    """

    def __init__(
        self,
        pool: Pool,
        work: Sequence[Work],
        on_layer: Callable[[int], None],
        kernel: DecodeKernel | FlashKernel | None = None,
    ) -> None:
        self._pool = pool
        self._on_layer = on_layer
        self._layer = 0
        self._masks: dict[tuple[int, int, DecodeGroup | Chunk], torch.Tensor] = {}
        single = sorted((w for w in work if w.count == 1), key=lambda w: w.request.slot)
        longer = [w for w in work if w.count > 1]
        self.work = [*single, *longer]
        self._flash = kernel if isinstance(kernel, FlashKernel) else None
        self._kernel = kernel if isinstance(kernel, DecodeKernel) and single else None
        self._single = [(w.request.slot, w.start + 1) for w in single]
        self._groups = [] if kernel else decode_groups(self._single)
        self._seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._chunks: list[Chunk] = []
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        segments: list[tuple[int, int, int, int]] = []
        sampled: list[int] = []
        for w in self.work:
            slot, row, stop = w.request.slot, len(ids), w.start + w.count
            ids += w.request.tokens[w.start : stop]
            positions += range(w.start, stop)
            segments.append((slot, row, w.count, w.start))
            if self._flash is None:  # which finds the places of new keys itself
                first = slot * pool.layout.slot_tokens
                places += range(first + w.start, first + stop)
            if w.count > 1:
                self._chunks.append(Chunk(row, w.count, slot, w.start))
            if w.samples:
                sampled.append(row + w.count - 1)
            pool.touch(slot, stop)
        self.input_ids = torch.tensor([ids])
        self.position_ids = torch.tensor([positions])
        self.sampled = torch.tensor(sampled, dtype=torch.long)
        self._places = torch.tensor(places, dtype=torch.long)
        self._segments = torch.tensor(segments)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """Serve one attention call."""
        number = self._layer
        self._layer += 1
        layer = self._pool.layout.layers[number]
        keys, values = self._pool.keys[number], self._pool.values[number]
        if self._flash is not None:
            out = self._flash(query, key, value, keys, values, self._segments, layer, call)
            self._on_layer(number)
            return out
        out = query.new_empty(1, query.shape[2], query.shape[1], layer.value_dim)
        done = 0
        if self._kernel is not None:
            self._kernel(query, key, value, keys, values, out, self._sights(layer), call)
            done = len(self._single)
        if done < query.shape[2]:
            for pool, new in ((keys, key), (values, value)):
                pool.view(-1, *pool.shape[2:]).index_copy_(0, self._places[done:], new[0, :, done:].transpose(0, 1))
        self._on_layer(number)
        for group in self._groups:
            out[0, group.row : group.row + group.count] = self._decode(group, layer, query, keys, values, call)
        for chunk in self._chunks:
            out[0, chunk.row : chunk.row + chunk.count] = self._prefill(chunk, layer, query, keys, values, call)
        return out

    def block(self, kernel: BlockKernel, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Serve a whole layer, [1, rows, hidden] -> [1, rows, hidden]."""
        number = self._layer
        self._layer += 1
        pool = self._pool.keys[number], self._pool.values[number]
        out = kernel.attend(x, cosines, sines, *pool, self._segments, self._pool.layout.layers[number])
        self._on_layer(number)
        kernel.feed()
        return out

    def _sights(self, layer: LayerSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slot, first key and number of keys of every row of one token, int64; the same for layers of a kind."""
        kind = (layer.window, layer.chunk)
        if kind not in self._seen:
            firsts = [layer.first_seen(length - 1) for _, length in self._single]
            slots, lengths = zip(*self._single, strict=True)
            self._seen[kind] = (torch.tensor(slots), torch.tensor(firsts), torch.tensor(lengths))
        return self._seen[kind]

    def _decode(
        self,
        group: DecodeGroup,
        layer: LayerSpec,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """[count, Hq, Dv]: one query token per request."""
        first, last = min(layer.first_seen(n - 1) for n in group.lengths), group.longest
        slots = slice(group.slot, group.slot + group.count)
        q = query[0, :, group.row : group.row + group.count].transpose(0, 1).unsqueeze(2)  # [count, Hq, 1, Dk]
        k = keys[slots, first:last].transpose(1, 2)
        v = values[slots, first:last].transpose(1, 2)
        mask = None
        if len(set(group.lengths)) > 1:
            mask = self._mask(layer, group, lambda: _decode_mask(layer, group, first, query.dtype))
        return attend(q.contiguous(), k, v, call, mask).squeeze(2)

    def _prefill(
        self,
        chunk: Chunk,
        layer: LayerSpec,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """[count, Hq, Dv]: consecutive tokens of one request."""
        first = layer.first_seen(chunk.start)
        q = query[:, :, chunk.row : chunk.row + chunk.count]
        k = keys[chunk.slot, first : chunk.stop].transpose(0, 1).unsqueeze(0)
        v = values[chunk.slot, first : chunk.stop].transpose(0, 1).unsqueeze(0)
        if chunk.start == 0 and layer.first_seen(chunk.stop - 1) == 0:
            return attend(q, k, v, call, None, causal=True)[0].transpose(0, 1)
        mask = self._mask(layer, chunk, lambda: _chunk_mask(layer, chunk, first, query.dtype))
        return attend(q, k, v, call, mask)[0].transpose(0, 1)

    def _mask(self, layer: LayerSpec, rows: DecodeGroup | Chunk, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Layers of the same kind share masks within a step."""
        key = (layer.window, layer.chunk, rows)
        if key not in self._masks:
            self._masks[key] = build()
        return self._masks[key]


def _decode_mask(layer: LayerSpec, group: DecodeGroup, first: int, dtype: torch.dtype) -> torch.Tensor:
    """[count, 1, 1, keys] over keys [first, longest)."""
    mask = torch.full((group.count, 1, 1, group.longest - first), -torch.inf, dtype=dtype)
    for i, length in enumerate(group.lengths):
        mask[i, 0, 0, layer.first_seen(length - 1) - first : length - first] = 0
    return mask


def _chunk_mask(layer: LayerSpec, chunk: Chunk, first: int, dtype: torch.dtype) -> torch.Tensor:
    """[count, keys] over keys [first, stop)."""
    positions = torch.arange(chunk.start, chunk.stop).view(-1, 1)
    keys = torch.arange(first, chunk.stop).view(1, -1)
    seen = keys <= positions
    if layer.window:
        seen &= keys > positions - layer.window
    if layer.chunk:
        seen &= keys >= positions // layer.chunk * layer.chunk
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
