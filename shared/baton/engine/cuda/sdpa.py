"""Attention over gathered pages with torch's own operations: any device, any model; the way out for the kernels."""

from __future__ import annotations

import torch

from baton.engine.attention import Call, attend
from baton.engine.cuda.inputs import Rows, Span
from baton.engine.layout import LayerSpec


class GatheredAttention:
    """Copies each request's pages together and calls SDPA, or plain steps for soft caps and sinks.

    Args:
        page_size: tokens of a page; any will do.
    """

    name = "sdpa"

    def __init__(self, page_size: int = 64) -> None:
        self.page_size = page_size

    def supports(self, layer: LayerSpec, call: Call, dtype: torch.dtype) -> bool:
        """Everything."""
        return True

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: Rows,
        layer: LayerSpec,
        call: Call,
    ) -> torch.Tensor:
        """One row per request: see `Attention`."""
        # A window's first page moves with the length, which only the device knows: the whole table is gathered.
        width = rows.tables.shape[1] * self.page_size
        at = torch.arange(width, device=query.device).view(1, -1)
        position = rows.lengths.view(-1, 1) - 1
        seen = _seen(layer, position, at)
        k, v = (_gather(pages, rows.tables) for pages in (keys, values))
        # Behind a request's last token lies what others left; even NaN times a weight of 0 is NaN.
        for copy in (k, v):
            copy.masked_fill_(~seen.view(*seen.shape, 1, 1), 0)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        out = attend(query.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), call, mask.view(-1, 1, 1, width))
        return out.squeeze(2)

    def prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: Rows,
        layer: LayerSpec,
        call: Call,
    ) -> torch.Tensor:
        """Any number of rows per request: see `Attention`."""
        return torch.cat(
            [
                self._request(query[span.row : span.row + span.count], keys, values, rows.tables[i], span, layer, call)
                for i, span in enumerate(rows.spans)
            ]
        )

    def _request(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        table: torch.Tensor,
        span: Span,
        layer: LayerSpec,
        call: Call,
    ) -> torch.Tensor:
        """[count, Hq, Dk] -> [count, Hq, Dv]."""
        first = 0
        if layer.window:
            first = max(0, span.start - layer.window + 1)
        elif layer.chunk:
            first = span.start // layer.chunk * layer.chunk
        page = first // self.page_size
        base = page * self.page_size
        table = table[page : -(-span.stop // self.page_size)]
        k, v = (_gather(pages, table.view(1, -1))[:, first - base : span.stop - base] for pages in (keys, values))
        positions = torch.arange(span.start, span.stop, device=query.device).view(-1, 1)
        seen = _seen(layer, positions, torch.arange(first, span.stop, device=query.device).view(1, -1))
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        out = attend(query.transpose(0, 1).unsqueeze(0), k.transpose(1, 2), v.transpose(1, 2), call, mask)
        return out[0].transpose(0, 1)


def _gather(pages: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[pages, page_size, heads, dim] by int32 [N, width] -> [N, width x page_size, heads, dim], a copy."""
    rows, width = tables.shape
    return pages.index_select(0, tables.reshape(-1)).view(rows, width * pages.shape[1], *pages.shape[2:])


def _seen(layer: LayerSpec, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether the token at each position attends to each key."""
    seen = keys <= positions
    if layer.window:
        seen = seen & (keys > positions - layer.window)
    if layer.chunk:
        seen = seen & (keys >= positions // layer.chunk * layer.chunk)
    return seen
