"""What a measurement found: tables for people, in the terminal and in Markdown, and the same as JSON."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from baton.bench.report import percentile

_DRAWS: Final = 1000


@dataclass(slots=True)
class Grid:
    """One table; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(slots=True)
class Findings:
    """All of one measurement.

    Attributes:
        title: what was measured, and how often.
        grids: the figures.
        notes: what has to be known to read them.
        misses: targets that were not reached.
    """

    title: str
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    def grid(self, title: str, *columns: str) -> Grid:
        """A new table."""
        self.grids.append(Grid(title, columns))
        return self.grids[-1]

    def expect(self, what: str, value: float, limit: float) -> None:
        """A target: `value` is at most `limit`, or it is a miss."""
        if not value <= limit:
            self.misses.append(f"{what}: {value:.4g}, more than {limit:g}")

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(self.title, style="bold")
        for grid in self.grids:
            table = Table(title=grid.title, title_justify="left", title_style="", box=None, header_style="dim")
            for column in grid.columns:
                table.add_column(column, justify="left" if column == grid.columns[0] else "right", no_wrap=True)
            for row in grid.rows:
                table.add_row(*row)
            console.print(table)
        for note in self.notes:
            console.print(note, style="dim")
        for miss in self.misses:
            console.print(f"missed: {miss}", style="red")

    def markdown(self) -> str:
        """The same in Markdown."""
        lines = [self.title, ""]
        for grid in self.grids:
            lines += [grid.title, "", f"| {' | '.join(grid.columns)} |", "|---|" + "---:|" * (len(grid.columns) - 1)]
            lines += [f"| {' | '.join(row)} |" for row in grid.rows]
            lines.append("")
        lines += [f"- {note}" for note in self.notes]
        lines += [f"- Missed: {miss}" for miss in self.misses]
        return "\n".join(lines) + "\n"

    def deliver(self, as_json: bool, markdown: Path | None) -> None:
        """Print it as a person or a program reads it, and write the Markdown."""
        if markdown is not None:
            markdown.write_text(self.markdown(), encoding="utf-8")
        if as_json:
            print(json.dumps(asdict(self), indent=2))
        else:
            self.show(Console(width=120))


def at(values: Sequence[float], percent: float) -> float:
    """A percentile; nan of nothing."""
    return percentile(sorted(values), percent) if values else float("nan")


def interval(values: Sequence[float], percent: float = 50) -> tuple[float, float, float]:
    """A percentile and its 95 % interval, from drawing the values anew; nan of nothing."""
    if not values:
        return (float("nan"),) * 3
    rng = random.Random(0)
    drawn = sorted(at(rng.choices(values, k=len(values)), percent) for _ in range(_DRAWS))
    return at(values, percent), percentile(drawn, 2.5), percentile(drawn, 97.5)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median of a few rounds, and their range."""
    if not values:
        return "-"
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low} {high}]"


def ms(value: tuple[float, float, float]) -> str:
    """A figure with its interval, milliseconds."""
    return "{:.2f} [{:.2f} {:.2f}]".format(*value)
