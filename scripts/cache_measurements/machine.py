"""What the machine and the measuring process themselves did while something was measured."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil

from baton.bench.load import heartbeat
from cache_measurements.findings import at


class Others:
    """Processor time that others take, from construction on: what the machine did, less what this process and those
    it started did. Processes that ended since are missing from the latter.
    """

    def __init__(self) -> None:
        self._busy, self._idle = _machine()
        self._own = _own()

    def share(self) -> float:
        """Of all processor time until now, 0 to 1."""
        busy, idle = _machine()
        all_time = busy + idle - self._busy - self._idle
        return max(0.0, busy - self._busy - (_own() - self._own)) / all_time if all_time else 0.0


@dataclass(slots=True)
class Watch:
    """See `watched`."""

    lags_ns: list[int] = field(default_factory=list)
    """How late this process's event loop woke up, sampled throughout."""
    others: float = 0.0
    """Share of the machine's processor time that others took. Known at the end."""

    def note(self) -> str:
        """For the report."""
        return (
            f"{psutil.cpu_count()} cores; others took {self.others:.0%} of their time. Lag of the measuring process's"
            f" event loop: p99 {at(self.lags_ns, 99) / 1e6:.2f} ms."
        )


@asynccontextmanager
async def watched() -> AsyncIterator[Watch]:
    """Measure inside the block: what is old is not collected as garbage in it, and machine and lag are watched."""
    watch, others = Watch(), Others()
    gc.collect()
    gc.freeze()
    beating = asyncio.create_task(heartbeat(watch.lags_ns))
    try:
        yield watch
    finally:
        watch.others = others.share()
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        gc.unfreeze()


def _machine() -> tuple[float, float]:
    """Seconds of all cores, busy and idle."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Guests' time is part of user's.
    return sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0), idle


def _own() -> float:
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children(recursive=True)))
