"""Serving a forward's attention calls over pages: which backend, and what each call writes and reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import torch

from baton.engine.attention import Call
from baton.engine.cuda.flash import FlashAttention, VarlenAttention
from baton.engine.cuda.inputs import Inputs, Rows
from baton.engine.cuda.pages import Pages
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.sdpa import GatheredAttention
from baton.engine.layout import LayerSpec
from baton.engine.messages import Role, SamplingParams
from baton.engine.request import Request
from baton.engine.scheduler import Work

_log = logging.getLogger(__name__)


class Attention(Protocol):
    """Attention of packed rows over the pages of their requests. New keys and values already lie in the pages."""

    @property
    def name(self) -> str:
        """For logs and reports."""

    @property
    def page_size(self) -> int:
        """Tokens of a page, as it wants them."""

    def supports(self, layer: LayerSpec, call: Call, dtype: torch.dtype) -> bool:
        """Whether it computes such a call, over elements of `dtype`."""

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """One row per request, and nothing read but tensors and their shapes: a graph may hold it.

        Args:
            query: [N, Hq, Dk].
            keys: [pages, page_size, Hkv, Dk].
            values: [pages, page_size, Hkv, Dv].
            rows: of the step.
            layer: windows and chunks.
            call: scaling, soft cap, sinks.

        Returns:
            [N, Hq, Dv].
        """

    def prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """As `decode`, with any number of rows per request, `rows.spans` given: [T, Hq, Dk] -> [T, Hq, Dv]."""


BACKENDS: tuple[Callable[[], Attention], ...] = (
    FlashAttention,
    VarlenAttention,
    lambda: VarlenAttention(key_starts=True),
)
"""Kernels that read pages, the fastest first."""


def choose(
    device: torch.device, dtype: torch.dtype, backends: Iterable[Callable[[], Attention]] = BACKENDS
) -> Attention:
    """The first backend that is there and proves itself on this device, else SDPA.

    Args:
        device: where the pages are.
        dtype: of the elements.
        backends: in order of preference.
    """
    for make in backends if device.type == "cuda" else ():
        try:
            backend = make()
            if proves_itself(backend, device, dtype):
                return backend
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            _log.info("attention backend not used: %s", error)
    return GatheredAttention()


def proves_itself(backend: Attention, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend gives SDPA's results on a small case: block tables, grouped heads, windows, chunks, decode.

    Kernels and their bindings change from release to release; one that reads its arguments in another way than we mean
    them must be found out before it serves anybody.
    """
    plain = LayerSpec(key="0", heads=2, key_dim=64, value_dim=64)
    call = Call(None, None, None, None, 0)
    if not backend.supports(plain, call, dtype):
        return False
    size = backend.page_size
    pages = Pages(6, size, 2, 2 * size)
    for slot in range(2):
        pages.prepare(slot, 0, 2 * size)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    keys, values = random(7, size, 2, 64), random(7, size, 2, 64)
    sdpa = GatheredAttention(size)
    for counts, starts in (((1, 1), (size + 3, 4)), ((40, 1), (size - 5, 30)), ((9, 70), (0, size))):
        works = [
            Work(_probe(slot, start + count), start, count)
            for slot, (start, count) in enumerate(zip(starts, counts, strict=True))
        ]
        inputs = Inputs(sum(counts), 2, pages, device, pinned=False)
        spans = inputs.fill(works, {})
        query = random(sum(counts), 4, 64)
        for layer in (plain, msgspec.structs.replace(plain, window=33)):
            rows = inputs.rows(sum(counts), 2, spans)
            expected = sdpa.prefill(query, keys, values, rows, layer, call)
            got = [backend.prefill(query, keys, values, rows, layer, call)]
            if counts == (1, 1):
                got.append(backend.decode(query, keys, values, inputs.rows(2, 2), layer, call))
            if not all(torch.allclose(out, expected, rtol=0.02, atol=0.02) for out in got):
                _log.warning("attention backend %s is not used: it gives other results than SDPA", backend.name)
                return False
    return True


def _probe(slot: int, tokens: int) -> Request:
    request = Request.probe([0] * tokens, Role.GENERATE, SamplingParams(max_tokens=1))
    request.slot = slot
    return request


class PagedForward:
    """The attention calls of one forward.

    Args:
        pool: where keys and values lie.
        attention: backend; calls it does not support go to SDPA.
        rows: of the step.
        on_written: called with the layer's number when the step's keys and values of it are on their way to the pages.
    """

    def __init__(
        self,
        pool: PagedPool,
        attention: Attention,
        rows: Rows,
        on_written: Callable[[int], None] = lambda layer: None,
    ) -> None:
        self._pool = pool
        self._attention = attention
        self._others = GatheredAttention(attention.page_size)
        self._rows = rows
        self._on_written = on_written
        self._layer = 0

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """Serve one call: query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
        number = self._layer
        self._layer += 1
        layer = self._pool.layout.layers[number]
        keys, values = self._pool.key_pages[number], self._pool.value_pages[number]
        for pages, new in ((keys, key), (values, value)):
            pages.flatten(0, 1).index_copy_(0, self._rows.places, new[0].transpose(0, 1))
        self._on_written(number)
        supported = self._attention.supports(layer, call, query.dtype)
        attention: Attention = self._attention if supported else self._others
        serve = attention.prefill if self._rows.spans else attention.decode
        return serve(query[0].transpose(0, 1), keys, values, self._rows, layer, call).unsqueeze(0)
