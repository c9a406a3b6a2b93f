"""How much may be tried again. Pure."""

from __future__ import annotations


class RetryBudget:
    """A token bucket that requests fill and retries empty: what fails for all is not asked for over and over.

    It is for work that a service in good health refused. What a lost worker had is moved without it: that worker does
    not do it any more, so there is not more work than before.

    Args:
        share: retries per request in the long run.
        reserve: retries that are there at the start, and most that can be saved up.
    """

    def __init__(self, share: float = 0.2, reserve: float = 10.0) -> None:
        assert share >= 0
        assert reserve >= 1
        self._share = share
        self._reserve = reserve
        self._saved = reserve

    def request(self) -> None:
        """A request came."""
        self._saved = min(self._reserve, self._saved + self._share)

    def spend(self) -> bool:
        """Whether one more retry is allowed, which is then spent."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
