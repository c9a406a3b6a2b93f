"""The fault suite in full: every row under its full load, and the table of docs/faults.md.

    python scripts/faults.py [--only F1,F6] [--list] [--json] [--no-page] [--lock FILE]

Engines are forked from a process that has imported torch, as in the test
suite: one that was killed is back after about a second. The exit status is 4 when a promise was broken or a number was
missed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "faults.md"
MISSED: Final = 4
BEGIN: Final = "<!-- results -->\n"
END: Final = "<!-- /results -->"
sys.path[:0] = [str(ROOT), str(ROOT / "shared"), str(ROOT / "services")]

from tests.faults.bed import Bed, running_bed  # noqa: E402
from tests.faults.history import Question  # noqa: E402
from tests.faults.questions import Lengths, questions  # noqa: E402
from tests.faults.report import as_json, merged  # noqa: E402
from tests.faults.rows import ROWS  # noqa: E402
from tests.faults.scenario import Result, Scenario, perform  # noqa: E402
from tests.fixtures import zygote  # noqa: E402
from tests.fixtures.models import random_llama  # noqa: E402

from baton.bench.turns import taking_turns  # noqa: E402


def main(
    only: Annotated[str, typer.Option(help="Rows, with commas between them, as F1,F14; default: all.")] = "",
    title: Annotated[str, typer.Option(help="Of these, only scenarios with this in their title.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List the scenarios and stop.")] = False,
    as_lines: Annotated[bool, typer.Option("--json", help="A line of JSON for each scenario on stdout.")] = False,
    page: Annotated[bool, typer.Option(help="Rewrite the rows that were run in docs/faults.md.")] = True,
    lock: Annotated[Path | None, typer.Option(help="Lock this file while a scenario runs.")] = None,
    seed: Annotated[int, typer.Option(help="Of questions and clients.")] = 0,
) -> None:
    """Run the rows."""
    wanted = [one.strip() for one in only.split(",") if one.strip()]
    if unknown := set(wanted) - {scenario.row for scenario in ROWS}:
        raise typer.BadParameter(f"there is no row {', '.join(sorted(unknown))}", param_hint="--only")
    chosen = [s for s in ROWS if (not wanted or s.row in wanted) and title in s.title]
    if show:
        for scenario in chosen:
            typer.echo(f"{scenario.row}  {scenario.title}")
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(stderr=True)
    with taking_turns(lock), zygote.serving():
        results = asyncio.run(_run(chosen, console, as_lines, page, seed))
    missed = [result for result in results if not result.held]
    console.print(f"{len(results) - len(missed)} of {len(results)} scenarios hold")
    if missed:
        raise typer.Exit(MISSED)


async def _run(chosen: Sequence[Scenario], console: Console, as_lines: bool, page: bool, seed: int) -> list[Result]:
    results: list[Result] = []
    books: dict[tuple[Path, Lengths, int], tuple[Question, ...]] = {}
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="baton-faults-model-") as directory,
        Progress(*columns, console=console) as progress,
    ):
        small = random_llama(Path(directory) / "small", hidden=64, layers=3, context=2048, seed=3)
        wide = random_llama(Path(directory) / "wide", hidden=256, layers=6, context=2048, seed=3)
        bar = progress.add_task("", total=len(chosen))
        for topology, scenarios in groupby(chosen, key=lambda scenario: scenario.topology):
            progress.update(bar, description=f"starting {', '.join(topology.services)}")
            model = wide if topology.wide else small
            async with running_bed(model, topology) as bed:
                for scenario in scenarios:
                    progress.update(bar, description=f"{scenario.row} {scenario.title}")
                    key = (model, scenario.lengths, scenario.questions)
                    if key not in books:
                        books[key] = questions(model, scenario.questions, scenario.lengths, seed)
                    result = await _perform(scenario, bed, books[key], seed, results)
                    results.append(result)
                    progress.advance(bar)
                    _tell(console, result)
                    if as_lines:
                        print(json.dumps(as_json(result)), flush=True)
                    if page:
                        _write(result)
    return results


async def _perform(
    scenario: Scenario, bed: Bed, book: tuple[Question, ...], seed: int, earlier: Sequence[Result]
) -> Result:
    by_title = {result.title: result for result in earlier}
    return await perform(scenario, bed, book, seed, by_title)


def _tell(console: Console, result: Result) -> None:
    mark = "[green]holds[/]" if result.held else "[red]missed[/]"
    console.print(f"{mark} {result.row} {result.title}: {result.codes} in {result.seconds:.0f} s", highlight=False)
    for at, what in result.happened:
        console.print(f"    {at:6.2f} s {what}", highlight=False)
    for figure in result.figures:
        wanted = f" ({figure.wanted})" if figure.wanted else ""
        console.print(
            f"    {'  ' if figure.met else '! '}{figure.name}{wanted}: {figure.value}", highlight=False, markup=False
        )
    for violation in result.violations[:10]:
        console.print(f"    ! {violation}"[:300], highlight=False, markup=False)
    if len(result.violations) > 10:
        console.print(f"    ! and {len(result.violations) - 10} more")


def _write(result: Result) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    old, ended, after = rest.partition(END)
    if not begun or not ended:
        raise typer.BadParameter(f"{PAGE} has no {BEGIN.strip()} with its {END}")
    PAGE.write_text(before + BEGIN + merged(old, [result]) + END + after, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
