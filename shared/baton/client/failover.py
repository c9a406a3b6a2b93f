"""Which router a request goes to, and to which when that one is lost. Pure, but for a clock that is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import grpc

from baton.client.errors import BatonRpcError

PATIENCE_SECONDS: Final = 5.0
"""How long a client of several routers goes on asking when none of them gets it further."""
_FIRST_PAUSE: Final = 0.1
_LAST_PAUSE: Final = 0.5
_ELSEWHERE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    # We did not cancel: the other side did, as it went.
    grpc.StatusCode.CANCELLED,
)


def split_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """The routers of a target, each once, in order.

    Args:
        target: gRPC names, in one string with commas between them, or one by one.

    Raises:
        ValueError: there is none.
    """
    parts = target.split(",") if isinstance(target, str) else target
    names = tuple(dict.fromkeys(name for part in parts if (name := part.strip())))
    if not names:
        raise ValueError("target: names no router")
    return names


class Routers:
    """The routers of one client, and the one that is asked first: the first one, until it is lost.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        assert count > 0
        self.count = count
        self.first = 0

    def after(self, lost: int) -> int:
        """The one to ask after another was lost. Who was asked first is not any more."""
        if self.first == lost:
            self.first = (lost + 1) % self.count
        return (lost + 1) % self.count


class Failover:
    """One request's way over the routers.

    A router that cannot be reached, stops, or has no worker, is left for the next one at once. When all were asked in
    vain there is a pause before the next round, and an end after `PATIENCE_SECONDS` without progress. One that is lost
    after more than that was at work until then, as it is on an answer in one piece: the patience begins anew, so often
    as there are routers, lest a request that takes one down after the other goes on for ever.

    Args:
        routers: of the client.
        timeout: of the whole request, seconds; None: none.
        now: clock, seconds, monotonic.

    Attributes:
        router: the one to ask now.
        moves: times it was another one than before.
    """

    def __init__(self, routers: Routers, timeout: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._routers = routers
        self._now = now
        self._deadline = None if timeout is None else now() + timeout
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._asked_at = now()
        self._renewals = 0  # of the patience, without progress
        self.router = routers.first
        self.moves = 0

    def timeout(self) -> float | None:
        """Seconds that are left."""
        return None if self._deadline is None else max(0.0, self._deadline - self._now())

    def progressed(self) -> None:
        """The router that was asked got it further."""
        self._failures = self._renewals = 0

    def lost(self, error: BatonRpcError) -> float:
        """The router that was asked is lost: `router` is the next one.

        Returns:
            Seconds to wait before it is asked.

        Raises:
            BatonRpcError: `error`, where nobody else would do better.
        """
        if self._routers.count == 1 or error.code not in _ELSEWHERE:
            raise error
        now = self._now()
        if self._failures and now - self._asked_at > PATIENCE_SECONDS and self._renewals < self._routers.count:
            self._failures = 0
            self._renewals += 1
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        rounds, asked = divmod(self._failures, self._routers.count)
        pause = min(_FIRST_PAUSE * 2.0 ** (rounds - 1), _LAST_PAUSE) if asked == 0 else 0.0
        end = self._failing_since + PATIENCE_SECONDS
        if now + pause > (end if self._deadline is None else min(end, self._deadline)):
            raise error
        self.router = self._routers.after(self.router)
        self.moves += 1
        self._asked_at = now + pause
        return pause
