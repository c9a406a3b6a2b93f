"""The table says what was wanted beside what was measured, and marks what was missed."""

from __future__ import annotations

from dataclasses import replace

from tests.faults.checker import Violation, Wrong
from tests.faults.report import MISS, merged, table
from tests.faults.scenario import Figure, Result

GOOD = Result(
    row="F2",
    title="kill -9 a decode worker",
    requests=800,
    codes={"OK": 800},
    violations=(),
    figures=(Figure("failed", "0 of 800", "0 of 800"), Figure("longest pause", "", "0.40 s")),
    happened=(),
    goodput=1.0,
    seconds=2.0,
)


def row_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_a_good_row() -> None:
    line = row_of(table([GOOD]), "| F2")
    assert line == (
        "| F2 | kill -9 a decode worker | 800 OK | 0 | failed 0 of 800 | 0 of 800<br>longest pause: 0.40 s |"
    )


def test_what_was_missed_is_marked() -> None:
    lost = (Violation(Wrong.LOST, 1, "no status"), Violation(Wrong.LOST, 2, "no status"), Violation(Wrong.GAP, 2, "x"))
    figures = (Figure("failed", "0 of 800", "3 of 800", met=False),)
    result = replace(GOOD, violations=lost, figures=figures)
    line = row_of(table([result]), "| F2")
    assert f"{MISS}: 1 gap, 2 lost" in line
    assert f"{MISS}: 3 of 800" in line
    assert not result.held
    assert GOOD.held


def test_rows_that_were_not_run_again_stay_and_others_are_replaced() -> None:
    other = replace(GOOD, row="F14", title="cancels")
    text = merged("", [other, GOOD])
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| F2", "| F14"]
    again = merged(text, [replace(other, codes={"OK": 7}), replace(GOOD, row="F9", title="slow")])
    assert [line.split(" | ")[0] for line in again.splitlines()[2:]] == ["| F2", "| F9", "| F14"]
    assert "| 7 OK |" in row_of(again, "| F14")
    assert row_of(again, "| F2") == row_of(text, "| F2")
