"""What a benchmark found: figures with their spread, and the limit of the machine beside each. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity measured several times."""

    median: float
    low: float
    high: float
    times: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of one value or more."""
        ranked = sorted(values)
        return Spread(median(ranked), ranked[0], ranked[-1], len(ranked))

    def text(self) -> str:
        """The median, and the range if there is one."""
        middle = number(self.median)
        return middle if self.times == 1 else f"{middle} ({number(self.low)}–{number(self.high)})"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of a table."""

    name: str
    value: Spread
    unit: str
    limit: Spread | None = None
    """What the machine could do at best, in the same unit."""
    limit_name: str = ""
    share: Spread | None = None
    """How much of the limit was reached, 0 to 1: of each repetition its own."""
    wanted: float | None = None
    """The share wanted."""

    @property
    def missed(self) -> bool:
        """Whether less was reached than wanted."""
        return self.wanted is not None and self.share is not None and self.share.median < self.wanted

    def cells(self) -> tuple[str, ...]:
        """For a table: name, value, unit, limit, share."""
        limit = f"{number(self.limit.median)} {self.limit_name}".strip() if self.limit else self.limit_name
        share = f"{self.share.median:.0%}" if self.share else ""
        if self.wanted is not None and self.share:
            share += f" (wanted {self.wanted:.0%})"
        return self.name, self.value.text(), self.unit, limit, share


@dataclass(slots=True)
class Findings:
    """One benchmark's result.

    Attributes:
        title: what was measured.
        command: what measured it.
        figures: the rows.
        circumstances: what the figures depend on.
        notes: what has to be known to read them.
    """

    title: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    circumstances: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def misses(self) -> list[Figure]:
        """Figures below what is wanted."""
        return [figure for figure in self.figures if figure.missed]

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
        wide = any(figure.limit for figure in self.figures)
        for title in COLUMNS if wide else COLUMNS[:3]:
            table.add_column(title, justify="right" if title in ("median (range)", "share") else "left")
        for figure in self.figures:
            table.add_row(*figure.cells()[: len(table.columns)], style="red" if figure.missed else "")
        return table

    def markdown(self) -> str:
        """The table, its circumstances and notes in Markdown."""
        lines = [f"`{self.command}`", "", "| " + " | ".join(COLUMNS) + " |", "|---|---:|---|---|---:|"]
        lines += ["| " + " | ".join(figure.cells()) + " |" for figure in self.figures]
        facts = "; ".join(f"{name}: {value}" for name, value in self.circumstances.items())
        lines += ["", *([f"{facts}.", ""] if facts else []), *self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)

    def write(self, json_file: Path | None, markdown_file: Path | None) -> None:
        """Write both files that are wanted.

        Raises:
            OSError: one cannot be written.
        """
        if json_file is not None:
            json_file.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        if markdown_file is not None:
            markdown_file.write_text(self.markdown(), encoding="utf-8")


COLUMNS = ("figure", "median (range)", "unit", "limit", "share")


def rate(
    name: str, values: list[float], unit: str, limits: list[float], limit_name: str, wanted: float | None = None
) -> Figure:
    """A figure where more is better, each value beside the limit measured next to it."""
    shares = Spread.of(value / limit for value, limit in zip(values, limits, strict=True))
    return Figure(name, Spread.of(values), unit, Spread.of(limits), limit_name, shares, wanted)


def number(value: float) -> str:
    """Three digits that matter, or all before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
