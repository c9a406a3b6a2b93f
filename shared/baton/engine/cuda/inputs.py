"""The inputs of a step on the device: one block of int32, filled on the host and copied in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.cuda.pages import TRASH, Pages
from baton.engine.scheduler import Work

PLACEHOLDER = -1
"""Stands in a request's tokens for one that was sampled on the device and has not been read yet."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row, row + count) of a step: tokens [start, start + count) of one request."""

    row: int
    count: int
    start: int

    @property
    def stop(self) -> int:
        """Keys the last of them sees."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Rows:
    """What attention must know of a step's T rows of N requests. All tensors are on the device.

    Attributes:
        places: int64 [T], where each row's key and value go in the flattened pages.
        lengths: int32 [N], keys of each request, its rows' own included.
        tables: int32 [N, width], pages of each request.
        query_starts: int32 [N + 1], first row of each request, and T.
        key_starts: int32 [N + 1], sums of the lengths before.
        spans: the same on the host, one per request; empty when every request has one row, and then nothing here may
            depend on more than the tensors' shapes, since a graph replays it for others.
        longest_query: rows of a request at most.
        longest_key: keys of a request at most.
    """

    places: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    spans: tuple[Span, ...]
    longest_query: int
    longest_key: int


class Inputs:
    """Buffers for steps of up to `tokens` rows of `requests` requests.

    The host's side is there twice, used in turn: the copy of one step may still be under way when the next is filled.

    Args:
        tokens: most rows.
        requests: most requests.
        pages: whose block tables these are.
        device: where the model runs.
        pinned: whether the host's side is page-locked.
    """

    def __init__(self, tokens: int, requests: int, pages: Pages, device: torch.device, *, pinned: bool) -> None:
        self._pages = pages
        width = pages.tables.shape[1]
        sizes = {
            "ids": tokens,
            "positions": tokens,
            "carried": tokens,
            "places": tokens,
            "lengths": requests,
            "query_starts": requests + 1,
            "key_starts": requests + 1,
            "sampled": requests,
            "tables": requests * width,
        }
        # Kernels want their vectors aligned to 16 bytes.
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes.values()]).tolist()
        starts = [0, *ends[:-1]]
        self._staging = [torch.zeros(ends[-1], dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._bulk = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        parts = {name: slice(start, start + sizes[name]) for name, start in zip(sizes, starts, strict=True)}
        self._host = [{name: bulk.numpy()[part] for name, part in parts.items()} for bulk in self._staging]
        self._device = {name: self._bulk[part] for name, part in parts.items()}
        self._turn = 0
        self._tokens, self._requests, self._width = tokens, requests, width

    def fill(self, work: Sequence[Work], carried: dict[int, int], *, pad_to: int = 0) -> tuple[Span, ...]:
        """Write a step down and start its copy to the device.

        Args:
            work: in the order of their rows.
            carried: request's sequence number -> place of its last token among those sampled by the step before, where
                that is not known on the host yet.
            pad_to: more rows, one token of nobody's each, up to so many.

        Returns:
            Where each request's rows are, without the padding.
        """
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        tables = host["tables"].reshape(self._requests, self._width)
        spans, row = [], 0
        for i, w in enumerate(work):
            request, stop = w.request, w.start + w.count
            own = slice(row, row + w.count)
            host["ids"][own] = request.tokens[w.start : stop]
            host["positions"][own] = np.arange(w.start, stop)
            host["carried"][own] = -1
            if request.tokens[stop - 1] == PLACEHOLDER:
                host["carried"][row + w.count - 1] = carried[request.sequence]
            host["places"][own] = self._pages.places(request.slot, w.start, stop)
            host["lengths"][i] = stop
            tables[i] = self._pages.tables[request.slot]
            spans.append(Span(row, w.count, w.start))
            row += w.count
        count = len(spans)
        if (padding := pad_to - row) > 0:
            for name, value in (("ids", 0), ("positions", 0), ("carried", -1), ("places", TRASH)):
                host[name][row:pad_to] = value
            host["lengths"][count : count + padding] = 1
            tables[count : count + padding] = TRASH
            count += padding
        lengths = host["lengths"][:count]
        host["query_starts"][: count + 1] = [*(span.row for span in spans), *range(row, row + count + 1 - len(spans))]
        host["key_starts"][0] = 0
        np.cumsum(lengths, out=host["key_starts"][1 : count + 1])
        sampled = [span.row + span.count - 1 for span, w in zip(spans, work, strict=True) if w.samples]
        host["sampled"][: len(sampled)] = sampled
        self._bulk.copy_(self._staging[self._turn], non_blocking=True)
        return tuple(spans)

    def rows(self, tokens: int, requests: int, spans: tuple[Span, ...] = ()) -> Rows:
        """What attention must know, for a step of so many rows and requests; `spans` unless every request has one."""
        part = self._device
        tables = part["tables"].view(self._requests, self._width)[:requests]
        longest = self._width * self._pages.page_size
        if spans:
            longest = max(span.stop for span in spans)
            tables = tables[:, : -(-longest // self._pages.page_size)]
        return Rows(
            places=part["places"][:tokens].long(),
            lengths=part["lengths"][:requests],
            tables=tables,
            query_starts=part["query_starts"][: requests + 1],
            key_starts=part["key_starts"][: requests + 1],
            spans=spans,
            longest_query=max((span.count for span in spans), default=1),
            longest_key=longest,
        )

    def ids(self, tokens: int, before: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 [1, tokens]; those in `before`, int64 [at least 1], the tokens of the step before, if so."""
        carried = self._device["carried"][:tokens].long()
        # One that was not settled on the device is -1 there; its row counts for nothing, whatever it computes.
        old = before[carried.clamp(min=0)].clamp(min=0)
        return torch.where(carried >= 0, old, self._device["ids"][:tokens].long()).view(1, -1)

    def positions(self, tokens: int) -> torch.Tensor:
        """int64 [1, tokens]."""
        return self._device["positions"][:tokens].long().view(1, -1)

    def sampled(self, count: int) -> torch.Tensor:
        """Rows whose logits are wanted, int64 [count]."""
        return self._device["sampled"][:count].long()
