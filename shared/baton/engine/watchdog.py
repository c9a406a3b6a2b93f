"""Whether an engine hangs, or only waits for a processor. Pure, but for what the kernel says of its threads."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_STEPS_TO_STALL: Final = 5
_STEPS_TO_HANG: Final = 10
_STALL_SHARE: Final = 0.5  # of the silence that is allowed


class Verdict(enum.Enum):
    """What an unanswered question says of an engine."""

    WAIT = "wait"
    STALLED = "stalled"  # nothing new should come to it
    HUNG = "hung"  # it will not answer any more


@dataclass(slots=True)
class Silence:
    """How long an engine has not answered, in time that it had.

    Two kinds of time are not held against it: what it spent waiting for a processor that others had, and what we did
    not look because we had none ourselves.

    Args:
        interval: seconds between two looks, if we get to them in time.
        delays: seconds each of the engine's threads had waited for a processor, when it was asked.
    """

    interval: float
    delays: Mapping[int, float]
    seconds: float = 0.0

    def looked(self, elapsed: float, delays: Mapping[int, float]) -> None:
        """Another look: nothing came. A step waits for its slowest thread, so what one thread waited is granted.

        Args:
            elapsed: seconds since the last one.
            delays: seconds each of the engine's threads has waited for a processor since it started. One that was not
                there at the last look counts from this one.
        """
        starved = max((delay - self.delays.get(thread, delay) for thread, delay in delays.items()), default=0.0)
        self.delays = delays
        self.seconds += max(0.0, min(elapsed, 2 * self.interval) - starved)

    def verdict(self, allowed: float, longest_step: float) -> Verdict:
        """What to make of it. Between two steps an engine answers at once, so a few of its longest are granted.

        Args:
            allowed: seconds of silence after which it hangs.
            longest_step: of this engine, seconds.
        """
        if self.seconds >= max(allowed, _STEPS_TO_HANG * longest_step):
            return Verdict.HUNG
        if self.seconds >= max(allowed * _STALL_SHARE, _STEPS_TO_STALL * longest_step):
            return Verdict.STALLED
        return Verdict.WAIT


def processor_delays(pid: int) -> dict[int, float]:
    """Seconds each thread of a process was ready to run and did not get to, by thread id.

    Without the threads that end meanwhile. Empty where the kernel does not tell, or the process is gone.
    """
    delays: dict[int, float] = {}
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return delays
    for thread in threads:
        try:
            delays[int(thread.name)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            continue
    return delays
