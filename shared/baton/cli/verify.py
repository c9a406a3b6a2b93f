"""`baton verify-ledger`: put known delays into a mesh, and see whether the ledger finds them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from baton.cli import console
from baton.models import bundled_model
from baton.verify.cases import CASES, Case
from baton.verify.estimate import Estimate
from baton.verify.experiment import Finding, run_case
from baton.verify.lab import running_lab

_TITLES = ("injected", "must show in", "ms", "there", "elsewhere", "largest", "pairs", "holds")


def verify_ledger(
    model: Annotated[
        Path | None, typer.Option(help="Model directory.", show_default="the bundled tiny model", metavar="DIR")
    ] = None,
    pairs: Annotated[int, typer.Option(min=5, help="Pairs of requests per case, at least.")] = 15,
    most_pairs: Annotated[int, typer.Option(min=5, help="And at most, where noise leaves it open.")] = 60,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Prove the ledger: inject delays of known size at known places, and compare.

    Starts a mesh of its own, with a fault proxy on every link and every service's wall clock minutes off. Exit code 1
    when the right entry grows by less than 95 % or more than 105 % of a delay, or others by more than 5 %.
    """
    findings = asyncio.run(_run(model or bundled_model(), pairs, max(pairs, most_pairs), only))
    if as_json:
        print(json.dumps([_json(finding) for finding in findings]))
    else:
        console.out.print(_table(findings))
        if not all(finding.holds for finding in findings):
            console.err.print("[dim]Other work on this machine shows as time elsewhere: try again when it is idle.[/]")
    if markdown is not None:
        markdown.write_text(_markdown(findings), encoding="utf-8")
    raise typer.Exit(0 if all(finding.holds for finding in findings) else 1)


async def _run(model: Path, pairs: int, most_pairs: int, only: str) -> list[Finding]:
    cases = [case for case in CASES if only in case.name]
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, console=console.err) as bars:
        task = bars.add_task("starting the mesh", total=len(cases))
        async with running_lab(model) as lab:
            findings = []
            for case in cases:

                def show(pair: int, case: Case = case) -> None:
                    bars.update(task, description=f"{case.name}, pair {pair}")

                show(0)
                findings.append(await run_case(lab, case, pairs, most_pairs, show))
                bars.advance(task)
    return findings


def _percent(estimate: Estimate) -> str:
    return f"{estimate.median:.1%} ±{(estimate.high - estimate.low) / 2:.1%}"


def _cells(finding: Finding) -> list[str]:
    return [
        finding.case.name,
        f"{finding.case.hop} {finding.case.kind}",
        f"{finding.injected * 1e3:.1f}",
        _percent(finding.share),
        _percent(finding.strayed),
        f"{finding.largest.median:.1%}",
        f"{finding.pairs}",
        "yes" if finding.holds else "NO",
    ]


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for index, title in enumerate(_TITLES):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=index > 0)
    for finding in findings:
        *cells, holds = _cells(finding)
        table.add_row(*cells, Text(holds, style="green" if finding.holds else "bold red"))
    return table


def _markdown(findings: Sequence[Finding]) -> str:
    rows = ["| " + " | ".join(_TITLES) + " |", "|---|---|---:|---:|---:|---:|---:|---|"]
    return "\n".join([*rows, *("| " + " | ".join(_cells(finding)) + " |" for finding in findings)]) + "\n"


def _json(finding: Finding) -> dict[str, object]:
    return {
        "case": finding.case.name,
        "entry": f"{finding.case.hop} {finding.case.kind}",
        "injected_ms": finding.injected * 1e3,
        "share": asdict(finding.share),
        "strayed": asdict(finding.strayed),
        "largest": asdict(finding.largest),
        "pairs": finding.pairs,
        "residual_ms": finding.residual * 1e3,
        "changes_ms": {part: change * 1e3 for part, change in finding.changes.items()},
        "holds": finding.holds,
    }
