"""Requests that may have broken an engine, one at a time.

When an engine dies, nobody knows which of the requests it computed was to blame. Each of them is tried again on another
worker, but as the only one there that is not proven. If that engine dies too, the guilty one is known: it was tried
twice, and nobody else pays for it, for what was computed there besides is innocent.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter

PROOF_TOKENS: Final = 4
"""Tokens that a suspect must get from the engine: its prompt was computed, and a few steps beyond were survived."""

_SAME_DEATH_SECONDS: Final = 1.0  # in which all whom an engine takes along learn of it

TRIALS = Counter("baton_trials_total", "Requests suspected of breaking engines, by how their trial went", ["outcome"])
for _outcome in ("proven", "guilty", "undecided"):
    TRIALS.labels(_outcome)


class Blame(enum.Enum):
    """What an engine's death says of a request that was there."""

    NONE = "none"  # somebody else did it, or it was not computed yet
    SUSPECT = "suspect"  # it may have
    GUILTY = "guilty"


@dataclass(eq=False, slots=True)
class Trial:
    """One suspect's.

    Attributes:
        delivered: tokens it had got before.
        turn: set when it may be computed.
        tokens: it got from the engine here.
    """

    delivered: int
    sequence: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: int = 0


class Trials:
    """The suspects of one worker.

    The one that got furthest before goes first: it is the least likely to do harm, and the others wait for it.

    Args:
        seconds: a trial that takes longer is undecided, and the next one begins beside it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: list[Trial] = []
        self._unproven: list[Trial] = []  # their turn has come; the last one's it is, unless it is undecided
        self._current: Trial | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sequence = itertools.count()
        self._died_at = -math.inf
        self._accused: tuple[Trial, ...] = ()  # of that death: who was unproven when the first one asked
        self._convicted = False

    @contextmanager
    def suspect(self, delivered: int) -> Iterator[Trial]:
        """A suspect, ready to be computed when its turn comes, is here for the length of the block.

        Args:
            delivered: tokens it had got before.
        """
        trial = Trial(delivered, next(self._sequence))
        self._waiting.append(trial)
        self._call_next()
        try:
            yield trial
        finally:
            self._leave(trial)

    def got(self, trial: Trial, tokens: int, *, finished: bool) -> None:
        """A suspect got tokens from the engine.

        Args:
            trial: its.
            tokens: how many.
            finished: its answer is complete.
        """
        trial.tokens += tokens
        if trial in self._unproven and (finished or trial.tokens >= PROOF_TOKENS):
            TRIALS.labels("proven").inc()
            self._leave(trial)

    def blame(self, trial: Trial | None, *, computed: bool) -> Blame:
        """Whose fault it is that the engine died, or failed a step. Asked by all it takes along, in any order.

        Args:
            trial: of the request; None: it was no suspect.
            computed: the engine had begun to compute it.
        """
        now = asyncio.get_running_loop().time()
        if now - self._died_at >= _SAME_DEATH_SECONDS:
            # Who is answered leaves, and others' turns come, before the next one asks: the verdict is on those of now.
            self._died_at, self._accused, self._convicted = now, tuple(self._unproven), False
        if not computed:
            return Blame.NONE
        if len(self._accused) != 1:
            return Blame.SUSPECT
        if trial is not self._accused[0] or self._convicted:
            return Blame.NONE
        self._convicted = True
        TRIALS.labels("guilty").inc()
        return Blame.GUILTY

    def _call_next(self) -> None:
        if self._current is not None or not self._waiting:
            return
        trial = min(self._waiting, key=lambda one: (-one.delivered, one.sequence))
        self._waiting.remove(trial)
        self._unproven.append(trial)
        self._current = trial
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._undecided)
        trial.turn.set()

    def _undecided(self) -> None:
        """It takes too long to hold the others up any more."""
        TRIALS.labels("undecided").inc()
        self._current = None
        self._call_next()

    def _leave(self, trial: Trial) -> None:
        if trial in self._waiting:
            self._waiting.remove(trial)
        if trial in self._unproven:
            self._unproven.remove(trial)
        if trial is self._current:
            assert self._timer is not None
            self._timer.cancel()
            self._current = None
        self._call_next()
