"""Whether an engine hangs, or only waits for a processor. Pure, but for what the kernel says of its threads."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
        delay: seconds the engine had waited for a processor, when it was asked.
    """

    interval: float
    delay: float
    seconds: float = 0.0

    def looked(self, elapsed: float, delay: float) -> None:
        """Another look: nothing came.

        Args:
            elapsed: seconds since the last one.
            delay: seconds the engine has waited for a processor since it started.
        """
        starved = max(0.0, delay - self.delay)
        self.delay = max(self.delay, delay)
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


def processor_delay(pid: int) -> float:
    """Seconds the threads of a process were ready to run and did not get to; of the thread that waited longest.

    A step waits for its slowest thread. 0 where the kernel does not tell, or the process is gone.
    """
    longest = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            longest = max(longest, int((task / "schedstat").read_text().split()[1]))
    except (OSError, ValueError, IndexError):
        return 0.0
    return longest / 1e9
