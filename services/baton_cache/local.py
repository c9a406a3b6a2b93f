"""A small copy of entries that are read, in memory, held only while Redis tells about every change. No I/O.

A value that was read before a change must not be put in after it. So who reads says so first (`reading`), a change
spoils the readings that are under way, and a spoilt reading keeps nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from baton_cache.metrics import LOCAL_BYTES, LOCAL_ENTRIES, LOCAL_ON, LOCAL_REMOVED

_OVERHEAD: Final = 512
"""Bytes an entry takes on top of its value, about."""


@dataclass(slots=True, eq=False)
class Reading:
    """A value on its way from Redis."""

    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    value: bytes
    until: float


class LocalTier:
    """Values by name; the least recently used go first. Off until it is turned on.

    Args:
        max_bytes: of all values together, with what holding them takes; 0: nothing is held.
        max_entries: how many.
        now: clock, seconds.
    """

    def __init__(self, max_bytes: int, max_entries: int, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._now = now
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._bytes = 0
        self._on = False
        self._readings: dict[str, set[Reading]] = {}

    @property
    def on(self) -> bool:
        """Whether it holds anything."""
        return self._on

    @property
    def max_bytes(self) -> int:
        """Bytes that may be held."""
        return self._max_bytes

    @property
    def size(self) -> int:
        """Bytes held, with what holding them takes."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str) -> bytes | None:
        """The value of a name; None: not held."""
        held = self._held.get(name)
        if held is None:
            return None
        if held.until <= self._now():
            self._remove(name, "expired")
            return None
        self._held.move_to_end(name)
        return held.value

    @contextmanager
    def reading(self, name: str) -> Iterator[Reading]:
        """Say that a value is about to be read, before it is asked for."""
        reading = Reading(spoilt=not self._on)
        self._readings.setdefault(name, set()).add(reading)
        try:
            yield reading
        finally:
            others = self._readings[name]
            others.discard(reading)
            if not others:
                del self._readings[name]

    def keep(self, name: str, reading: Reading, value: bytes, ttl_seconds: float) -> None:
        """Hold a value that was read, unless it changed since."""
        size = _size(name, value)
        if reading.spoilt or size > self._max_bytes or ttl_seconds <= 0:
            return
        self._forget(name)
        self._held[name] = _Held(value, self._now() + ttl_seconds)
        self._bytes += size
        while self._bytes > self._max_bytes or len(self._held) > self._max_entries:
            self._remove(next(iter(self._held)), "evicted")
        self._show()

    def changed(self, name: str) -> None:
        """A value is no longer what it was."""
        for reading in self._readings.get(name, ()):
            reading.spoilt = True
        if name in self._held:
            self._remove(name, "changed")

    def turn_on(self) -> None:
        """From here on, every change is told."""
        self._on = True
        LOCAL_ON.set(1)

    def turn_off(self) -> None:
        """Changes may go untold: hold nothing."""
        self._on = False
        LOCAL_ON.set(0)
        self.drop()

    def drop(self) -> None:
        """Everything changed."""
        for readings in self._readings.values():
            for reading in readings:
                reading.spoilt = True
        LOCAL_REMOVED.labels("dropped").inc(len(self._held))
        self._held.clear()
        self._bytes = 0
        self._show()

    def _remove(self, name: str, why: str) -> None:
        self._forget(name)
        LOCAL_REMOVED.labels(why).inc()
        self._show()

    def _forget(self, name: str) -> None:
        if (held := self._held.pop(name, None)) is not None:
            self._bytes -= _size(name, held.value)

    def _show(self) -> None:
        LOCAL_ENTRIES.set(len(self._held))
        LOCAL_BYTES.set(self._bytes)


def _size(name: str, value: bytes) -> int:
    return len(name) + len(value) + _OVERHEAD
