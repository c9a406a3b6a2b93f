"""What `baton up` shows: bars while services load, their warnings while they serve, and their end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from baton.cli.service_process import ServiceProcess
from baton.cli.waterfall import bar

_LOUD: Final = frozenset({"WARNING", "ERROR", "CRITICAL"})
_BAR_CELLS: Final = 24
_COLOURS: Final = {"serving": "green", "stopping": "yellow", "stopped": "dim", "waiting": "dim"}


class Progress:
    """The terminal side of `baton up`. Without a terminal it prints a line per event instead of drawing.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_log(self, process: ServiceProcess, entry: dict[str, Any]) -> None:
        """Show a service's warnings and errors as they come."""
        level = entry.get("level")
        if level in _LOUD:
            colour = "yellow" if level == "WARNING" else "red"
            text = escape(str(entry.get("message", "")))
            self._console.print(f"[{colour}]{process.name}[/] {text}", soft_wrap=True)
        elif not self._console.is_terminal and entry.get("message") in ("serving", "stopped"):
            self._console.print(f"{process.name} {entry['message']}", soft_wrap=True)

    @contextmanager
    def starting(self, services: Sequence[ServiceProcess]) -> Iterator[None]:
        """Bars while the block runs."""
        with self._live(services, "starting"):
            yield

    @contextmanager
    def stopping(self, services: Sequence[ServiceProcess]) -> Iterator[None]:
        """States while the block runs, then one line."""
        began = time.monotonic()
        with self._live(services, "stopping"):
            yield
        self._console.print(f"[dim]stopped in {time.monotonic() - began:.1f} s[/]")

    @contextmanager
    def _live(self, services: Sequence[ServiceProcess], title: str) -> Iterator[None]:
        if not self._console.is_terminal:
            self._console.print(title)
            yield
            return
        view = _View(services, title)
        # transient: what stays on the screen is the result, not the way there.
        with Live(view, console=self._console, refresh_per_second=10, transient=True):
            yield


class _View:
    """Redrawn ten times a second from the services' current state."""

    def __init__(self, services: Sequence[ServiceProcess], title: str) -> None:
        self._services = services
        self._spinner = Spinner("dots", text=title)
        self._began = time.monotonic()

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        self._spinner.update(text=Text(f"{time.monotonic() - self._began:.0f} s", style="dim"))
        table.add_row(self._spinner, "", "")
        for service in self._services:
            colour = _COLOURS.get(service.stage, "cyan")
            filled = Text(bar(service.fraction, _BAR_CELLS).ljust(_BAR_CELLS, "░"), style=colour)
            table.add_row(service.name, filled, Text(service.stage, style=colour))
        return table


def readable(line: str) -> str:
    """A JSON log line as a person reads it; any other line as it is."""
    try:
        entry = json.loads(line)
        message = f"{entry['level']} {entry['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    exception = entry.get("exception")
    return f"{message}\n{exception}" if exception else message
