"""Which page of the device's memory holds which tokens of which slot. Pure; no torch.

A page holds the keys and values of `page_size` consecutive tokens of a request, in every layer. Slots share the pages
of a common prefix by reference count. Page 0 is nobody's: what belongs to no request is written there, and tables name
it where a slot has no page, so that a kernel which reads a whole table stays inside the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from baton.engine.errors import EngineError

TRASH = 0


class PageCopy(NamedTuple):
    """Tokens [0, tokens) of page `source` are to be copied to page `target`."""

    source: int
    target: int
    tokens: int


class Run(NamedTuple):
    """Tokens [token, token + tokens) of a slot lie in `page` from place `first` on."""

    page: int
    first: int
    token: int
    tokens: int


class Pages:
    """Free list, reference counts and block tables.

    Args:
        count: pages to give out; with the trash page there are one more.
        page_size: tokens of a page.
        num_slots: slots.
        slot_tokens: most tokens of a slot.

    Attributes:
        tables: int32 [num_slots, pages of a slot], page numbers; TRASH where a slot has none.
    """

    def __init__(self, count: int, page_size: int, num_slots: int, slot_tokens: int) -> None:
        self.page_size = page_size
        self.tables = np.full((num_slots, -(-slot_tokens // page_size)), TRASH, np.int32)
        self._held = [0] * num_slots  # pages of each slot
        self._references = [0] * (count + 1)
        self._free = list(range(count, 0, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def held(self, slot: int) -> int:
        """Pages of a slot."""
        return self._held[slot]

    def references(self, page: int) -> int:
        """Slots that hold a page."""
        return self._references[page]

    def prepare(self, slot: int, start: int, stop: int) -> list[PageCopy]:
        """Make tokens [start, stop) of a slot its own to write, pages for them included.

        Returns:
            What to copy first: pages that others hold too are left to them.

        Raises:
            EngineError: no page is free.
        """
        copies = []
        for index in range(start // self.page_size, min(self._pages(stop), self._held[slot])):
            page = int(self.tables[slot, index])
            if self._references[page] > 1:
                own = self._take()
                self._references[page] -= 1
                self.tables[slot, index] = own
                if index * self.page_size < start or stop < (index + 1) * self.page_size:
                    copies.append(PageCopy(page, own, self.page_size))
        while self._held[slot] < self._pages(stop):
            self.tables[slot, self._held[slot]] = self._take()
            self._held[slot] += 1
        return copies

    def share(self, source: int, target: int, tokens: int) -> list[PageCopy]:
        """Give slot `target`, which loses what it has, tokens [0, tokens) of slot `source`: whole pages by reference.

        Returns:
            The copy of the last page's beginning, where `tokens` end inside a page.

        Raises:
            EngineError: no page is free.
            IndexError: the source has fewer pages.
        """
        if source == target:
            return []
        if self._pages(tokens) > self._held[source]:
            raise IndexError(f"slot {source} has no {tokens} tokens")
        self.trim(target, 0)
        whole, rest = divmod(tokens, self.page_size)
        for index in range(whole):
            page = int(self.tables[source, index])
            self._references[page] += 1
            self.tables[target, index] = page
        self._held[target] = whole
        if not rest:
            return []
        page = self.tables[target, whole] = self._take()
        self._held[target] = whole + 1
        return [PageCopy(int(self.tables[source, whole]), int(page), rest)]

    def trim(self, slot: int, tokens: int) -> None:
        """A slot keeps the pages of tokens [0, tokens) at most."""
        for index in range(self._pages(tokens), self._held[slot]):
            page = int(self.tables[slot, index])
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
            self.tables[slot, index] = TRASH
        self._held[slot] = min(self._held[slot], self._pages(tokens))

    def places(self, slot: int, start: int, stop: int) -> np.ndarray:
        """Places of tokens [start, stop) in the flattened pages: int32 [stop - start]. They must have pages."""
        tokens = np.arange(start, stop, dtype=np.int32)
        pages: np.ndarray = self.tables[slot, tokens // self.page_size]
        return pages * np.int32(self.page_size) + tokens % self.page_size

    def runs(self, slot: int, start: int, stop: int) -> Iterator[Run]:
        """Tokens [start, stop), page by page. They must have pages."""
        while start < stop:
            index, first = divmod(start, self.page_size)
            count = min(self.page_size - first, stop - start)
            yield Run(int(self.tables[slot, index]), first, start, count)
            start += count

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _take(self) -> int:
        if not self._free:
            raise EngineError("no page is free")
        page = self._free.pop()
        self._references[page] = 1
        return page


def pages_needed(capacity_tokens: int, page_size: int, num_slots: int) -> int:
    """Pages that hold `capacity_tokens` however they are spread over slots: each slot's last page may be part empty."""
    return capacity_tokens // page_size + num_slots
