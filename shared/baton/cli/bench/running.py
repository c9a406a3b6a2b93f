"""What the measuring commands share: their options, a line that says what is measured now, the result's ways out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.status import Status

from baton.bench.figures import Figure, Findings
from baton.bench.machine import circumstances
from baton.bench.quiet import Use, watched
from baton.cli import console
from baton.engine.layout import KvDtype
from baton.models import bundled_model

Model = Annotated[
    Path | None, typer.Option(help="Model directory.", show_default="the bundled tiny model", metavar="DIR")
]
Rounds = Annotated[int, typer.Option(min=1, help="Repetitions; medians and ranges are told.")]
Dtype = Annotated[KvDtype, typer.Option(help="Element type of weights and KV.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")]

_BUSY: Final = 0.1
"""Cores others may use without a warning."""

_MISSED: Final = 4
"""Exit code: 1 is a failure, 3 the load generator's refusal."""

OnProgress = Callable[[str], None]


def model_directory(model: Path | None) -> Path:
    """The directory asked for, or the bundled model's; ends the command when there is none."""
    try:
        directory = model or bundled_model()
    except FileNotFoundError as error:
        console.fail(str(error), code=2)
    if not (directory / "config.json").is_file():
        console.fail(f"{directory} holds no model: it has no config.json", code=2)
    return directory.resolve()


def all_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def measuring(*failures: type[Exception]) -> Iterator[tuple[OnProgress, Use]]:
    """Show what is measured now; count what others use of the processors meanwhile.

    Args:
        failures: what ends the command with its message.
    """
    try:
        with console.err.status("") as status, watched() as use:
            yield _shown(status), use
    except failures as error:
        console.fail(str(error))


def tell(
    title: str,
    figures: list[Figure],
    use: Use,
    facts: dict[str, str],
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Print the table and write the files. Exit code 4 when a figure is below what is wanted of it."""
    findings = Findings(
        title=title,
        command=shlex.join(["baton", *sys.argv[1:]]),
        figures=figures,
        circumstances=facts | circumstances() | {"cores others used": f"{use.others:.2f}"},
    )
    console.out.print(findings.table())
    if use.others > _BUSY:
        console.err.print(
            f"[yellow]others used {use.others:.1f} cores meanwhile:[/] measure again on a quiet machine", soft_wrap=True
        )
    try:
        findings.write(json_file, markdown_file)
    except OSError as error:
        console.fail(str(error))
    for figure in findings.misses:
        console.err.print(f"[red]missed:[/] {escape(figure.name)}", soft_wrap=True)
    if findings.misses:
        raise typer.Exit(_MISSED)


def _shown(status: Status) -> OnProgress:
    def show(text: str) -> None:
        status.update(f"[dim]{escape(text)}[/]")

    return show
