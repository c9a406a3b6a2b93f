"""What the steps of an engine take, learned from its reports: least squares that forget. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

from baton.engine.messages import StepReport
from baton.worker.step_cost import StepCost

_FORGET: Final = 0.95  # of all that was learned, kept at each new step of the same kind
_PULL: Final = 0.05  # weight of the start values, in steps: what the latest steps do not tell stays as it was
_UNKNOWN: Final = 0.001  # the same before there are any
_OUTLIER: Final = 4.0  # a step that took longer than so many times the expected counts as one that took that long
_TRUSTED: Final = 8  # steps after which there is something to expect; it is brought up to date so often


class Line:
    """A linear function without negative coefficients, fitted to its latest points.

    Args:
        scales: a typical size of each variable; of the same size, they weigh alike.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        self._scales = tuple(scales)
        size = len(scales)
        self._moments = [[0.0] * size for _ in range(size)]
        self._answers = [0.0] * size
        self._start, self._pull = [0.0] * size, _UNKNOWN
        self._fitted = [0.0] * size
        self._stale = False
        self._points = 0

    def learn(self, at: Sequence[float], value: float) -> None:
        """One more point."""
        scaled = [a / scale for a, scale in zip(at, self._scales, strict=True)]
        if self._points >= _TRUSTED:
            if self._points % _TRUSTED == 0:
                self._solve()
            value = min(value, _OUTLIER * sum(c * a for c, a in zip(self._fitted, scaled, strict=True)))
        for i, a in enumerate(scaled):
            for j, b in enumerate(scaled):
                self._moments[i][j] = _FORGET * self._moments[i][j] + a * b
            self._answers[i] = _FORGET * self._answers[i] + a * value
        self._points += 1
        self._stale = True

    def settle(self) -> None:
        """What is known now are the start values."""
        self._start, self._pull = self._solve(), _PULL

    def value(self, at: Sequence[float]) -> float:
        """What is expected there."""
        return sum(c * a for c, a in zip(self.coefficients(), at, strict=True))

    def coefficients(self) -> list[float]:
        """Of the variables, in their own units."""
        return [c / scale for c, scale in zip(self._solve(), self._scales, strict=True)]

    def _solve(self) -> list[float]:
        if self._stale:
            self._fitted, self._stale = self._fit(), False
        return self._fitted

    def _fit(self) -> list[float]:
        """The best of all fits in which some coefficients are 0 and the others are not negative.

        There are at most three coefficients, so all of them are tried.
        """
        size = len(self._scales)
        best, least = [0.0] * size, 0.0  # of the squared error, less what is the same for all
        for count in range(1, size + 1):
            for chosen in combinations(range(size), count):
                matrix = [[self._moments[i][j] + (self._pull if i == j else 0.0) for j in chosen] for i in chosen]
                answers = [self._answers[i] + self._pull * self._start[i] for i in chosen]
                solved = solve(matrix, answers)
                error = -sum(c * a for c, a in zip(solved, answers, strict=True))
                if error < least and min(solved) >= 0:
                    least = error
                    best = [0.0] * size
                    for i, c in zip(chosen, solved, strict=True):
                        best[i] = c
        return best


def solve(matrix: list[list[float]], answers: list[float]) -> list[float]:
    """x of matrix x = answers, by elimination; the matrix is symmetric and positive definite, so no pivot is 0."""
    rows = [[*row, answer] for row, answer in zip(matrix, answers, strict=True)]
    size = len(rows)
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
    solved = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (rows[i][size] - known) / rows[i][i]
    return solved


class StepMeter:
    """Learns the `StepCost` of one engine.

    Steps with and without prompt tokens are forgotten each at their own pace: a worker that only decodes for an hour
    still knows what a prompt costs.

    Args:
        step_tokens: of a step at most.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self.forget()

    def learn(self, report: StepReport) -> None:
        """A step was made."""
        if not report.duration_ns:
            return
        seconds = report.duration_ns / 1e9
        if report.prefill_tokens:
            # The weights are read once for both parts of a step, so of decode only what each request adds counts.
            others = report.decode_requests * self._decode.coefficients()[1]
            at = (1.0, report.prefill_tokens, report.attended_pairs)
            self._prefill.learn(at, max(0.0, seconds - others))
        elif report.decode_requests:
            self._decode.learn((1.0, report.decode_requests), seconds)

    def settle(self) -> None:
        """The warm-up is over: what it told is what later steps correct."""
        self._decode.settle()
        self._prefill.settle()

    def forget(self) -> None:
        """Begin anew: the first steps of a process tell of its start."""
        self._decode = Line((1.0, 8.0))
        self._prefill = Line((1.0, float(self._step_tokens), 4.0 * self._step_tokens**2))

    def cost(self) -> StepCost | None:
        """What is known; None before the first prompt."""
        decode, per_decode = self._decode.coefficients()
        prefill, per_token, per_pair = self._prefill.coefficients()
        if not prefill + per_token + per_pair:
            return None
        return StepCost(decode, per_decode, prefill, per_token, per_pair, self._step_tokens)
