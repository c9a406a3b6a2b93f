"""The KV pool on a device: pages there, and the shared memory file as the host's side of them.

The front reads and writes slots of the file as it does on a CPU. Keys and values go down to it layer by layer for
prompts computed for others (`download`), and up from it once the front has written what it received (`upload`).
"""

from __future__ import annotations

import os
import weakref

import torch

from baton.engine.cuda.pages import PageCopy, Pages, pages_needed
from baton.engine.cuda.streams import Event, Streams
from baton.engine.layout import PoolLayout
from baton.engine.pool import TORCH_DTYPES, Pool

_LOCKED_SHARE = 0.25  # of the machine's memory, that the file may be page-locked in


class PagedPool(Pool):
    """Memory of all slots on a device. `keys` and `values` are the host's side.

    Attributes:
        pages: which page holds what.
        device: where the pages are.
        key_pages: per layer [pages + 1, page_size, heads, key_dim].
        value_pages: per layer [pages + 1, page_size, heads, value_dim].
        registered: whether the file is page-locked, so that copies to and from it do not block.

    Args:
        layout: of the file.
        capacity_tokens: tokens of all slots together.
        page_size: tokens of a page.
        device: where the pages are.
        streams: of that device.
        memory_fd: the file, empty; -1: an own one.
    """

    def __init__(
        self,
        layout: PoolLayout,
        capacity_tokens: int,
        page_size: int,
        device: torch.device,
        streams: Streams,
        memory_fd: int = -1,
    ) -> None:
        super().__init__(layout, capacity_tokens * layout.bytes_per_token, memory_fd)
        count = pages_needed(capacity_tokens, page_size, layout.num_slots)
        self.pages = Pages(count, page_size, layout.num_slots, layout.slot_tokens)
        self.device = device
        self._streams = streams
        self._leaving: dict[int, Event] = {}  # slot -> when the last copy down to it is done
        dtype = TORCH_DTYPES[layout.dtype]
        # Zeros: memory that was never written may hold NaN, which no weight of 0 makes harmless.
        self.key_pages = [
            torch.zeros(count + 1, page_size, layer.heads, layer.key_dim, dtype=dtype, device=device)
            for layer in layout.layers
        ]
        self.value_pages = [
            torch.zeros(count + 1, page_size, layer.heads, layer.value_dim, dtype=dtype, device=device)
            for layer in layout.layers
        ]
        # Page-locked memory is taken at once and for good, whether slots are used or not.
        affordable = layout.total_bytes <= _LOCKED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
        self.registered = affordable and streams.register(address, layout.total_bytes)
        if self.registered:
            weakref.finalize(self, streams.unregister, address).atexit = False

    def prepare(self, slot: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of the slot are about to be written on the device: they get pages of their own."""
        self._copy_pages(self.pages.prepare(slot, start, stop))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Tokens [0, tokens) of slot `source` are the first ones of slot `target` too, whose own are lost."""
        self._copy_pages(self.pages.share(source, target, tokens))

    def release(self, slot: int, *, clean: bool, kept: int = 0) -> None:
        """The slot is free again, but for tokens [0, kept).

        Attention here never reads behind a request's last token, so that nothing need be wiped, clean or not.
        """
        if (event := self._leaving.pop(slot, None)) is not None:
            event.synchronize()  # the next holder's front may write to the file at once
        self.pages.trim(slot, kept)
        if not self.registered:  # a page-locked file is memory for good
            super().release(slot, clean=True)

    def finite(self, slot: int, start: int, stop: int) -> bool:
        """Whether all keys and values of tokens [start, stop) are finite. Waits for the device."""
        if start >= stop:
            return True
        places = torch.from_numpy(self.pages.places(slot, start, stop)).to(self.device)
        return all(
            bool(pages.flatten(0, 1).index_select(0, places).isfinite().all())
            for pages in (*self.key_pages, *self.value_pages)
        )

    def download(self, layer: int, slot: int, start: int, stop: int) -> Event:
        """Copy tokens [start, stop) of a layer to the file, beside what is launched later.

        Returns:
            When that is done.
        """
        self.touch(slot, stop)
        with self._streams.aside():
            for page, first, token, count in self.pages.runs(slot, start, stop):
                for device, host in self._sides(layer):
                    host[slot, token : token + count].copy_(device[page, first : first + count], non_blocking=True)
            event = self._streams.record()
        self._leaving[slot] = event
        return event

    def upload(self, slot: int, start: int, stop: int) -> None:
        """Copy tokens [start, stop) of all layers from the file; what is launched later sees them."""
        self.prepare(slot, start, stop)
        for layer in range(len(self.layout.layers)):
            for page, first, token, count in self.pages.runs(slot, start, stop):
                for device, host in self._sides(layer):
                    device[page, first : first + count].copy_(host[slot, token : token + count], non_blocking=True)

    def _sides(self, layer: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return (self.key_pages[layer], self.keys[layer]), (self.value_pages[layer], self.values[layer])

    def _copy_pages(self, copies: list[PageCopy]) -> None:
        for source, target, tokens in copies:
            for pages in (*self.key_pages, *self.value_pages):
                pages[target, :tokens] = pages[source, :tokens]
