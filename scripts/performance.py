"""Measure everything docs/performance.md has a table of, and rewrite the tables.

    python scripts/performance.py --model DIR [--only limits,engine] [--rounds N] [--lock FILE] [--vllm VENV] ...

Without --only it takes about half an hour. Peers are measured when an environment of one is named.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "performance.md"
SECTIONS: Final = ("limits", "engine", "stall", "mesh", "handoff", "peers")
WITHOUT_MODEL: Final = ("handoff",)
sys.path[:0] = [str(ROOT), str(ROOT / "shared")]

from baton.bench.machine import circumstances  # noqa: E402
from baton.bench.turns import taking_turns  # noqa: E402

MISSED: Final = 4
"""Exit code of a benchmark whose figures are below what is wanted."""


def main(
    model: Annotated[Path, typer.Option(help="Model directory; scripts/make_bench_model.py makes one.")],
    only: Annotated[str, typer.Option(help="Sections, with commas between them.")] = ",".join(SECTIONS),
    rounds: Annotated[int | None, typer.Option(min=1, help="Repetitions; default: each benchmark's own.")] = None,
    lock: Annotated[Path | None, typer.Option(help="Lock this file while measuring.")] = None,
    vllm: Annotated[Path | None, typer.Option(help="vLLM's virtual environment.")] = None,
    preload: Annotated[str | None, typer.Option(help="LD_PRELOAD of vLLM.")] = None,
    page: Annotated[Path, typer.Option(help="Page to rewrite.")] = PAGE,
) -> None:
    """Measure, and rewrite the page."""
    wanted = only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        raise typer.BadParameter(f"no section {unknown.pop()!r}; there are {', '.join(SECTIONS)}", param_hint="--only")
    again = ["--rounds", str(rounds)] if rounds else []
    for section in wanted:
        if section == "peers":
            if vllm is None:
                typer.echo("peers: no environment of one is named, left as they are", err=True)
                continue
            flags = ["--vllm", str(vllm), *(["--preload", preload] if preload else []), *again]
            flags += ["--lock", str(lock)] if lock else []
            table = _run([sys.executable, "-m", "tests.bench.peers.compare"], ["--model", str(model), *flags])
            facts = "; ".join(f"{name}: {value}" for name, value in circumstances().items())
            table += f"\n{facts}.\n"
        else:
            command = [sys.executable, "-m", "baton.cli", "bench", section]
            if section not in _commands():
                typer.echo(f"{section}: this build has no such benchmark, left as it is", err=True)
                continue
            with taking_turns(lock):
                table = _run(command, [*(() if section in WITHOUT_MODEL else ("--model", str(model))), *again])
        page.write_text(replaced(page.read_text(encoding="utf-8"), section, table), encoding="utf-8")


def replaced(text: str, section: str, table: str) -> str:
    """A page with another table between a section's markers.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin.strip()} with its {end} in the page")
    return before + begin + table.strip("\n") + "\n" + end + after


def _commands() -> str:
    command = [sys.executable, "-m", "baton.cli", "bench", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command: list[str], flags: list[str]) -> str:
    """A benchmark's Markdown; its own output goes to the terminal."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "table.md"
        done = subprocess.run([*command, *flags, "--markdown", str(path)], cwd=ROOT, check=False)
        if done.returncode not in (0, MISSED):
            raise typer.Exit(done.returncode)
        # Where the model and the table lay is this machine's affair.
        table = path.read_text(encoding="utf-8").replace(f" --markdown {path}", "")
        return re.sub(r"--model \S+", "--model DIR", table)


if __name__ == "__main__":
    typer.run(main)
