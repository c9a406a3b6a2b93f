"""Results as a Markdown table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.faults.scenario import Figure, Result

MISS = "**missed**"


def table(results: Iterable[Result]) -> str:
    """One row a scenario, and one line a figure in it: what was wanted beside what was measured."""
    lines = [
        "| row | fault | requests | lost, wrong, leaked, dishonest | number to reach | measured |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        broken = _broken(result)
        judged = [figure for figure in result.figures if figure.wanted]
        told = [figure for figure in result.figures if not figure.wanted]
        wanted = "<br>".join(f"{figure.name} {figure.wanted}" for figure in judged)
        measured = "<br>".join(_measured(figure) for figure in [*judged, *told])
        codes = ", ".join(f"{count} {code}" for code, count in sorted(result.codes.items()))
        lines.append(f"| {result.row} | {_cell(result.title)} | {codes or '0'} | {broken} | {wanted} | {measured} |")
    return "\n".join(lines) + "\n"


def _measured(figure: Figure) -> str:
    text = _cell(figure.value)
    if not figure.wanted:
        return f"{figure.name}: {text}"
    return text if figure.met else f"{MISS}: {text}"


def _broken(result: Result) -> str:
    if not result.violations:
        return "0"
    counts: dict[str, int] = {}
    for violation in result.violations:
        counts[violation.wrong.value] = counts.get(violation.wrong.value, 0) + 1
    return f"{MISS}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def merged(old: str, new: Sequence[Result]) -> str:
    """A table in which the rows of scenarios that were run anew are replaced, and new ones come at their row's place.

    Args:
        old: a table that `table` wrote; empty: there is none.
        new: what was run.
    """
    kept = {_key(line): line for line in old.splitlines() if line.startswith("| F")}
    head = table([]).splitlines()
    fresh = {_key(line): line for line in table(new).splitlines() if line.startswith("| F")}
    rows = kept | fresh
    ordered = sorted(rows.items(), key=lambda item: int(item[0][0].removeprefix("F")))  # stable within a row
    return "\n".join([*head, *(line for _, line in ordered)]) + "\n"


def _key(line: str) -> tuple[str, str]:
    cells = [cell.strip() for cell in line.split(" | ")]
    return cells[0].removeprefix("| ").strip(), cells[1]


def as_json(result: Result) -> Mapping[str, Any]:
    """Plain values."""
    return {
        "row": result.row,
        "title": result.title,
        "held": result.held,
        "requests": result.requests,
        "codes": result.codes,
        "violations": [str(violation) for violation in result.violations],
        "figures": [
            {"name": figure.name, "wanted": figure.wanted, "value": figure.value, "met": figure.met}
            for figure in result.figures
        ],
        "happened": [{"seconds": round(at, 3), "what": what} for at, what in result.happened],
        "tokens_per_second": round(result.goodput, 1),
        "seconds": round(result.seconds, 1),
    }
