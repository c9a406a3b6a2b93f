"""What one writes and many read: an append-only list with an end, and a way to wait for more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class StreamLog(Generic[ItemT]):
    """Items in order. Readers keep their own position, so each gets all of them, from the first, at its own pace.

    Attributes:
        items: what was written so far; readers look, only `extend` adds.
        ended: whether nothing more comes.
        error: why it ended early; None: it did not.
    """

    def __init__(self) -> None:
        self.items: list[ItemT] = []
        self.ended = False
        self.error: BaseException | None = None
        self._changed = asyncio.Event()

    def extend(self, items: Iterable[ItemT]) -> None:
        """Write."""
        assert not self.ended
        self.items.extend(items)
        self.notify()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes. Once is enough; later calls change nothing."""
        if not self.ended:
            self.ended, self.error = True, error
            self.notify()

    def notify(self) -> None:
        """Wake all who wait, to look at what changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """Wait for the next write, end, or notification. Look before waiting, without an await in between."""
        await self._changed.wait()
