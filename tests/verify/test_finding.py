"""The verdict on a case sees what a sum would hide."""

from __future__ import annotations

import pytest

from baton.verify.cases import Case
from baton.verify.estimate import Estimate
from baton.verify.experiment import Finding, finding_of

CASE = Case("router to decode, +50 ms", lambda lab: None, "decode", "network", 0.05)
RIGHT, A, B = ("decode", "network"), ("decode", "compute"), ("router", "overhead")


def found(**changes: float) -> Finding:
    entry = {RIGHT: changes["right"], A: changes.get("a", 0.0), B: changes.get("b", 0.0)}
    return finding_of(CASE, [entry] * 9, [sum(entry.values())] * 9, 0.0)


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"right": 0.050}, True),
        ({"right": 0.048, "a": 0.002}, True),
        ({"right": 0.050, "a": 0.0024, "b": -0.0024}, True),
        ({"right": 0.047, "a": 0.003}, False),  # missing
        ({"right": 0.053}, False),  # more than was injected
        ({"right": 0.050, "a": 0.003}, False),  # elsewhere
        ({"right": 0.050, "a": 0.040, "b": -0.040}, False),  # elsewhere, though the sum is nothing
    ],
)
def test_holds(changes: dict[str, float], holds: bool) -> None:
    finding = found(**changes)
    assert finding.holds is holds
    assert finding.surely_holds is holds


def test_noise_leaves_it_open() -> None:
    wide = Estimate(0.0, -0.08, 0.08)
    finding = Finding(CASE, 0.05, Estimate(1.0, 1.0, 1.0), wide, Estimate(0.0, 0.0, 0.0), {}, 0.0, 9)
    assert finding.holds
    assert not finding.surely_holds
