"""What tracing costs a request: meshes with and without it side by side, asked in turn, in random order.

    python scripts/measure_tracing.py [--minutes 4] [--state FILE] [--json]

A block is a burst of requests to each mesh, one at a time; the order of the meshes is drawn anew for each block, so
whatever else the machine does meets all of them alike. A burst lasts longer than the half second between two exports:
what exporting costs falls on the mesh that exports. The last row compares two meshes without tracing: so much does the
method itself err. Intervals are 95 %, from drawing blocks anew. With --state blocks are kept, and the next run adds to
them. Memory is what the services grew by beyond those without tracing, in this run.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Final

import grpc
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from baton.bench.load import precise_loop
from baton.cli.plan import Plan
from baton.cli.stack import Stack
from baton.models import bundled_model
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

SERVICES: Final = ("router", "cache", "prefill", "decode")
NOBODY: Final = "http://127.0.0.1:9"
REFERENCE, CONTROL = "no tracing", "no tracing, once more"
TRACED: Final = ("with a collector", "collector down", "collector takes spans and never answers")
FIGURES: Final = tuple((what, rank) for what in ("first", "whole") for rank in (50, 90, 99))
DRAWS: Final = 1000
WARM_UP: Final = 30

Block = dict[str, list[tuple[int, int]]]
"""By mesh, of each request: nanoseconds to the first token, and to the end."""


class Asked:
    """A running mesh."""

    def __init__(self, stack: Stack, target: str) -> None:
        self._processes = [psutil.Process(service.pid) for service in stack.services]
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def memory(self) -> int:
        """Resident bytes of all its processes, engines included."""
        return sum(p.memory_info().rss for own in self._processes for p in (own, *own.children(recursive=True)))

    async def ask(self, ids: list[int], tokens: int) -> tuple[int, int]:
        """One request through all four services: its prompt is new, and its answer is stored."""
        request = inference_pb2.StreamGenerateRequest(
            token_ids=sampling_pb2.TokenIds(ids=ids),
            sampling=sampling_pb2.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
        )
        began, first = time.perf_counter_ns(), 0
        async for event in self._stub.StreamGenerate(request, timeout=60):
            if not first and event.WhichOneof("event") == "chunk":
                first = time.perf_counter_ns() - began
        return first, time.perf_counter_ns() - began

    async def close(self) -> None:
        """Leave it."""
        await self._channel.close()


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to ask; starting takes another one.")] = 4.0,
    burst: Annotated[int, typer.Option(min=1, help="Requests to a mesh before the next one's turn.")] = 20,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 96,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 2,
    state: Annotated[Path | None, typer.Option(help="File with earlier blocks; this run's are added.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Measure what tracing costs a request."""
    settings = {"burst": burst, "prompt": prompt, "tokens": tokens}
    blocks = _earlier(state, settings)
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        new, grown, spans = runner.run(_measure(minutes * 60, burst, prompt, tokens))
    blocks += new
    if state is not None:
        lines = [json.dumps(settings), *(json.dumps(block) for block in blocks)]
        state.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ratios = {name: _ratios(blocks, name) for name in (*TRACED, CONTROL)}
    rates = {name: _rate(blocks, name) for name in ratios}
    if as_json:
        figures = {
            name: {
                "tokens a second": rates[name],
                **{f"{what} p{rank}": found for (what, rank), found in zip(FIGURES, row, strict=True)},
            }
            for name, row in ratios.items()
        }
        print(json.dumps({**settings, "blocks": len(blocks), "ratios": figures, "grown_bytes": grown, "spans": spans}))
        return
    table = Table(box=None, header_style="dim", title_justify="left")
    table.add_column("mesh", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    for what, rank in FIGURES:
        table.add_column(f"{'TTFT' if what == 'first' else 'all'} p{rank}", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for name, row in ratios.items():
        more = (grown[name] - grown[REFERENCE]) / 2**20
        cells = (f"{ratio:.3f} [{low:.3f} {high:.3f}]" for ratio, low, high in (rates[name], *row))
        table.add_row(name, *cells, f"{more:+.1f} MiB")
    console = Console(width=215)
    reference = ", ".join(f"{rank}: {_quantile(blocks, REFERENCE, what, rank):.2f}" for what, rank in FIGURES)
    console.print(f"{len(blocks)} blocks, {len(blocks) * burst} requests a mesh; ratios to no tracing, 95 % intervals")
    console.print(f"no tracing, ms, first token and all, percentiles {reference}; {spans} spans arrived")
    console.print(table)


async def _measure(seconds: float, burst: int, prompt: int, tokens: int) -> tuple[list[Block], dict[str, int], int]:
    """Blocks, what each mesh's memory grew by, and spans that arrived."""
    rng = random.Random()
    blocks: list[Block] = []
    async with AsyncExitStack() as stack:
        sinks = [stack.enter_context(_Sink()), stack.enter_context(_Sink("--stuck"))]
        endpoints = ["", "", sinks[0].address, NOBODY, sinks[1].address]
        meshes = {
            name: await stack.enter_async_context(_mesh(endpoint))
            for name, endpoint in zip((REFERENCE, CONTROL, *TRACED), endpoints, strict=True)
        }
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        bar = progress.add_task("blocks", total=seconds)

        async def ask(mesh: Asked, times: int) -> list[tuple[int, int]]:
            return [await mesh.ask([rng.randrange(5, 2000) for _ in range(prompt)], tokens) for _ in range(times)]

        for mesh in meshes.values():
            await ask(mesh, WARM_UP)
        before = {name: mesh.memory() for name, mesh in meshes.items()}
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            order = rng.sample(list(meshes), len(meshes))
            blocks.append({name: await ask(meshes[name], burst) for name in order})
            progress.update(bar, completed=time.monotonic() - began)
        grown = {name: mesh.memory() - before[name] for name, mesh in meshes.items()}
        await asyncio.sleep(1)
        spans = sinks[0].count()
    return blocks, grown, spans


class _Sink:
    """A running `span_sink.py`."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("span_sink.py")), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def count(self) -> int:
        """End it; how many spans came."""
        return int(self._process.communicate(timeout=10)[0])

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


@asynccontextmanager
async def _mesh(endpoint: str) -> AsyncIterator[Asked]:
    flags = ("--otlp-endpoint", endpoint) if endpoint else ()
    extra = dict.fromkeys(SERVICES, flags)
    plan = Plan(bundled_model(), prefill=1, decode=1, listen="127.0.0.1:0", redis_url="", extra=extra)
    stack = Stack(plan, None, 120.0, lambda process, line: None)
    try:
        mesh = Asked(stack, (await stack.start()).router)
        try:
            yield mesh
        finally:
            await mesh.close()
    finally:
        await stack.stop()


def _earlier(state: Path | None, settings: dict[str, int]) -> list[Block]:
    if state is None or not state.exists():
        return []
    first, *lines = state.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != settings:
        raise typer.BadParameter(f"{state} was measured with {first}", param_hint="--state")
    return [json.loads(line) for line in lines]


def _values(blocks: list[Block], name: str, what: str) -> np.ndarray:
    """[blocks, burst] milliseconds."""
    return np.array([[pair[what == "whole"] for pair in block[name]] for block in blocks]) / 1e6


def _quantile(blocks: list[Block], name: str, what: str, rank: int) -> float:
    return float(np.percentile(_values(blocks, name, what), rank))


def _rate(blocks: list[Block], name: str) -> tuple[float, float, float]:
    """Tokens a second to the reference's, and the interval of that: one request at a time, so times the other way."""
    rng = np.random.default_rng(0)
    mesh, reference = (_values(blocks, each, "whole").sum(axis=1) for each in (name, REFERENCE))
    draws = rng.integers(len(blocks), size=(DRAWS, len(blocks)))
    low, high = np.percentile(reference[draws].sum(axis=1) / mesh[draws].sum(axis=1), [2.5, 97.5])
    return float(reference.sum() / mesh.sum()), float(low), float(high)


def _ratios(blocks: list[Block], name: str) -> list[tuple[float, float, float]]:
    """Of each figure: the mesh's by the reference's, and the interval of that."""
    rng = np.random.default_rng(0)
    draws = [np.arange(len(blocks)), *rng.integers(len(blocks), size=(DRAWS, len(blocks)))]
    found = []
    for what in ("first", "whole"):
        mesh, reference = _values(blocks, name, what), _values(blocks, REFERENCE, what)
        ranks = [rank for other, rank in FIGURES if other == what]
        rows = np.array([np.percentile(mesh[d], ranks) / np.percentile(reference[d], ranks) for d in draws])
        low, high = np.percentile(rows[1:], [2.5, 97.5], axis=0)
        found += [(float(a), float(b), float(c)) for a, b, c in zip(rows[0], low, high, strict=True)]
    return found


if __name__ == "__main__":
    typer.run(main)
