"""`baton bench stall`: what running streams feel of long prompts, divided and undivided."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Final

import typer

from baton.bench.figures import Figure, Spread
from baton.bench.streams import Source, Stall, draw_prompts
from baton.bench.streams import stall as measure_stall
from baton.bench.workload import longest_context, vocabulary
from baton.cli.bench.local_mesh import MESH_FAILURES, Tiers, local_mesh, on_halves
from baton.cli.bench.running import (
    Dtype,
    JsonFile,
    MarkdownFile,
    Model,
    OnProgress,
    Rounds,
    all_cores,
    measuring,
    model_directory,
    tell,
)
from baton.engine.layout import KvDtype

WANTED: Final = 2.0
"""Worst gap over undisturbed gap, divided."""
_RUNNING_TOKENS: Final = 64
"""Of the running streams' prompts."""
_SLOT_TOKENS: Final = 4096
"""Room for one request: the running streams should last."""


def stall(
    model: Model = None,
    dtype: Dtype = KvDtype.BFLOAT16,
    rounds: Rounds = 3,
    streams: Annotated[int, typer.Option(min=1, help="Streams that run all the time.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts that arrive.")] = 2048,
    arrivals: Annotated[int, typer.Option(min=1, help="Prompts that arrive in one measurement.")] = 3,
    quiet_seconds: Annotated[float, typer.Option(min=0.1, help="Undisturbed time before each.")] = 1.0,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure how long running streams wait when long prompts arrive.

    Two meshes take turns: one with prefill and decode on a core each (on half of the cores each, where there are
    more), one with a single engine on all of them. Exit code 4 when the worst gap of the divided one is more than
    twice its undisturbed gap.
    """
    shapes = {"divided": on_halves(), "undivided": Tiers(None, threads=all_cores())}
    directory = model_directory(model)
    with measuring(*MESH_FAILURES) as (on_progress, use):
        seen = asyncio.run(
            _measure(directory, dtype, shapes, rounds, streams, prompt_tokens, arrivals, quiet_seconds, on_progress)
        )
    figures = [figure for name, results in seen.items() for figure in _figures(name, results)]
    facts = {"model": directory.name, "dtype": dtype, "streams": str(streams), "arriving tokens": str(prompt_tokens)}
    tell("Long prompts among running streams", figures, use, facts, json_file, markdown_file)


async def _measure(
    model: Path,
    dtype: KvDtype,
    shapes: dict[str, Tiers],
    rounds: int,
    streams: int,
    prompt_tokens: int,
    arrivals: int,
    quiet_seconds: float,
    on_progress: OnProgress,
) -> dict[str, list[Stall]]:
    slot_tokens = min(longest_context(model), _SLOT_TOKENS)
    flags = {"dtype": dtype, "num-slots": str(streams + 2), "slot-tokens": str(slot_tokens)}
    seen: dict[str, list[Stall]] = {name: [] for name in shapes}
    async with AsyncExitStack() as stack:
        sources: dict[str, Source] = {}
        for name, tiers in shapes.items():
            on_progress(f"starting the mesh: {name}")
            sources[name] = await stack.enter_async_context(local_mesh(model, tiers, flags))
        vocab, longest = vocabulary(model), slot_tokens - _RUNNING_TOKENS
        for number in range(rounds + 1):
            for name, source in sources.items():
                on_progress(f"round {number} of {rounds}: {name}")
                running = draw_prompts(streams, _RUNNING_TOKENS, vocab, 2 * number)
                arriving = draw_prompts(arrivals if number else 1, prompt_tokens, vocab, 2 * number + 1)
                result = await measure_stall(source, running, arriving, quiet_seconds=quiet_seconds, longest=longest)
                if number:
                    seen[name].append(result)
    return seen


def _figures(name: str, results: Sequence[Stall]) -> list[Figure]:
    ratios = Spread.of(result.ratio for result in results)
    share = Spread.of(WANTED / result.ratio for result in results)
    wanted = 1.0 if name == "divided" else None
    return [
        Figure(f"{name}: undisturbed gap", Spread.of(result.undisturbed_gap_ms for result in results), "ms"),
        Figure(f"{name}: worst gap", Spread.of(result.worst_gap_ms for result in results), "ms"),
        Figure(f"{name}: worst over undisturbed", ratios, "x", Spread.of([WANTED]), "allowed", share, wanted),
        Figure(f"{name}: TTFT of the long prompts", Spread.of(result.ttft_ms for result in results), "ms"),
    ]
