"""A ledger as a waterfall: hops indented as they call each other, bars to scale, residual last. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.client import Entry, Ledger, Partition

COLOURS: Final = {
    "compute": "green",
    "queue": "yellow",
    "network": "blue",
    "transfer": "magenta",
    "serialize": "cyan",
    "cache": "bright_blue",
    "tokenize": "bright_cyan",
    "stall": "red",
    "overhead": "bright_black",
}
_DEPTH: Final = {"router": 0, "cache": 1, "decode": 1, "prefill": 2}
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_BAR_CELLS: Final = 40


def milliseconds(nanoseconds: float) -> str:
    """A duration in ms with three significant digits or so: 0.04, 1.23, 45.6, 789."""
    value = nanoseconds / 1e6
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A horizontal bar of `share` (0 to 1) of `cells` characters, in eighths of one."""
    eighths = round(max(0.0, min(1.0, share)) * cells * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def waterfall(ledger: Ledger) -> RenderableType:
    """Both partitions, or why there are none."""
    parts: list[RenderableType] = []
    for title, partition in (("to the first token", ledger.first_token), ("whole request", ledger.total)):
        if partition is None:
            continue
        parts += [Text(), Text(f"{title}: {milliseconds(partition.total_ns)} ms", style="bold"), _table(partition)]
        if partition.hidden_transfer_ns:
            hidden = milliseconds(partition.hidden_transfer_ns)
            parts.append(Text(f"besides, {hidden} ms of KV transfer hidden behind compute", style="dim"))
    return Group(*parts) if parts else Text("The server sent no ledger.", style="dim")


def in_call_order(entries: Sequence[Entry]) -> list[Entry]:
    """Entries by hop, callers first."""
    return sorted((entry for entry in entries if entry.duration_ns), key=lambda entry: _DEPTH.get(entry.hop, 9))


def _table(partition: Partition) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    whole = max(1, partition.total_ns)
    before = 0
    previous = ""
    for entry in in_call_order(partition.entries):
        name = "" if entry.hop == previous else "  " * _DEPTH.get(entry.hop, 0) + entry.hop
        colour = COLOURS.get(entry.kind, "white")
        table.add_row(
            name, Text(entry.kind, style=colour), *_figures(entry.duration_ns, whole), _bar(before, entry, whole)
        )
        before += entry.duration_ns
        previous = entry.hop
    table.add_row("", Text("residual", style="dim"), *_figures(partition.residual_ns, whole), Text())
    return table


def _figures(duration_ns: int, whole: int) -> tuple[str, str]:
    return f"{milliseconds(duration_ns)} ms", f"{duration_ns / whole:.1%}"


def _bar(before: int, entry: Entry, whole: int) -> Text:
    """The entry's bar, beginning where the one above ended."""
    start = min(_BAR_CELLS - 1, before * _BAR_CELLS // whole)
    return Text(" " * max(0, start) + (bar(entry.duration_ns / whole) or "▏"), style=COLOURS.get(entry.kind, "white"))
