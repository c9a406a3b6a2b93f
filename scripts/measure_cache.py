"""What the response cache gives and costs, measured on real processes of this machine.

    python scripts/measure_cache.py hits       time to first token of stored answers, and where it goes
    python scripts/measure_cache.py replica    hits per second of one cache replica, beside bare Redis
    python scripts/measure_cache.py faults     what requests pay when Redis, or the cache itself, is broken
    python scripts/measure_cache.py zipf       what is saved on a trace whose questions repeat
    python scripts/measure_cache.py coalesce   equal requests at the same time, over routers and cache replicas

Each prints tables, or JSON with --json, and writes Markdown with --markdown FILE. What is compared takes turns in one
run, so a busy machine hurts both alike. docs/cache.md says what the figures mean.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))

from cache_measurements import coalesce, faults, hits, replica, zipf
from cache_measurements.findings import Findings

from baton.bench.load import precise_loop

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Patient = Annotated[bool, typer.Option(help="Wait 2 s for the cache and 1 s for Redis, not 100 and 20 ms.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the tables here as Markdown.", metavar="FILE")]


@app.command("hits")
def _hits(
    rounds: Annotated[int, typer.Option(min=1, help="Turns.")] = 12,
    requests: Annotated[int, typer.Option(min=16, help="Hits a turn and number in flight.")] = 160,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 32,
    local: Annotated[bool, typer.Option(help="Let the cache hold in memory what it read from Redis.")] = False,
    as_json: AsJson = False,
    markdown: Markdown = None,
) -> None:
    """Time to first token of stored answers, and where it goes."""
    _run(lambda progress: hits.measure(progress, rounds, requests, tokens, local), as_json, markdown)


@app.command("replica")
def _replica(
    rounds: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a turn of each way and number in flight.")] = 2.0,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 32,
    as_json: AsJson = False,
    markdown: Markdown = None,
) -> None:
    """Hits per second of one cache replica, beside bare Redis."""
    _run(lambda progress: replica.measure(progress, rounds, seconds, tokens), as_json, markdown)


@app.command("faults")
def _faults(
    rounds: Annotated[int, typer.Option(min=1, help="Times each thing breaks.")] = 10,
    calls: Annotated[int, typer.Option(min=1, help="Pairs of requests while it is broken.")] = 20,
    as_json: AsJson = False,
    markdown: Markdown = None,
) -> None:
    """What requests pay when Redis, or the cache itself, is broken."""
    _run(lambda progress: faults.measure(progress, rounds, calls), as_json, markdown)


@app.command("zipf")
def _zipf(
    rounds: Annotated[int, typer.Option(min=1, help="Times the trace is asked, with the cache and without.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Length of the trace.")] = 1000,
    questions: Annotated[int, typer.Option(min=1, help="Different prompts to draw from.")] = 300,
    exponent: Annotated[float, typer.Option(min=0, help="Of Zipf's law; 0: all prompts are equally popular.")] = 1.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 0,
    patient: Patient = False,
    as_json: AsJson = False,
    markdown: Markdown = None,
) -> None:
    """What is saved on a trace whose questions repeat."""
    trace = zipf.Trace(requests, questions, exponent, seed)
    _run(lambda progress: zipf.measure(progress, trace, rounds, in_flight, tokens, patient), as_json, markdown)


@app.command("coalesce")
def _coalesce(
    rounds: Annotated[int, typer.Option(min=1, help="Different requests.")] = 10,
    requests: Annotated[int, typer.Option(min=1, help="Equal requests at the same time.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    patient: Patient = False,
    as_json: AsJson = False,
    markdown: Markdown = None,
) -> None:
    """Equal requests at the same time, over three routers and two cache replicas."""
    _run(lambda progress: coalesce.measure(progress, rounds, requests, tokens, patient), as_json, markdown)


def _run(measure: Callable[[Progress], Awaitable[Findings]], as_json: bool, markdown: Path | None) -> None:
    async def run() -> Findings:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            return await measure(progress)

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        found = runner.run(run())
    found.deliver(as_json, markdown)


if __name__ == "__main__":
    app()
