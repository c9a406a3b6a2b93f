"""`baton bench placement`: whether deciding where a prompt is computed is as good as the better of both ways."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from baton.bench.mesh_source import MeshSource
from baton.bench.placement import MODES, Point, Seen, figures, first_tokens
from baton.bench.streams import draw_prompts
from baton.bench.workload import longest_context, vocabulary
from baton.cli.bench.local_mesh import MESH_FAILURES, Tiers, local_mesh, on_halves
from baton.cli.bench.running import (
    Dtype,
    JsonFile,
    MarkdownFile,
    Model,
    OnProgress,
    Rounds,
    measuring,
    model_directory,
    tell,
)
from baton.engine.layout import KvDtype
from baton.v1 import inference_pb2

_RUNNING_TOKENS: Final = 64
"""Of the running streams' prompts."""
_SLOT_TOKENS: Final = 4096
_PAUSE: Final = 0.1
"""Seconds between two arrivals."""
_WARM_UP: Final = 4
"""Prompts sent to every mesh before anything is measured."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is measured."""

    points: list[Point]
    rounds: int
    arrivals: int


def placement(
    model: Model = None,
    dtype: Dtype = KvDtype.BFLOAT16,
    rounds: Rounds = 3,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of the prompts that arrive.")] = "32,128,512,2048",
    streams: Annotated[str, typer.Option(help="Streams that run meanwhile.")] = "0,4,8",
    together: Annotated[str, typer.Option(help="Prompts that arrive at once.")] = "1",
    arrivals: Annotated[int, typer.Option(min=1, help="Arrivals in each round.")] = 8,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure first tokens with prompts computed by decode, by prefill, and where decode decides.

    Three meshes take turns, each with prefill and decode on half of the cores. Exit code 4 when the 95th percentile
    of auto is more than 10 % above that of the better of the other two, anywhere.
    """
    tiers = on_halves()
    directory = model_directory(model)
    with measuring(*MESH_FAILURES) as (on_progress, use):
        axes = [_numbers(text) for text in (prompt_tokens, streams, together)]
        points = [Point(*values) for values in itertools.product(*axes)]
        room = min(longest_context(directory), _SLOT_TOKENS) - 1
        if not points or any(not 0 < p.prompt_tokens <= room or p.streams < 0 or p.together < 1 for p in points):
            raise ValueError(f"prompts have 1 to {room} tokens, of which at least one arrives")
        seen = asyncio.run(_measure(directory, dtype, tiers, Sweep(points, rounds, arrivals), on_progress))
    facts = {"model": directory.name, "dtype": dtype, "arrivals": f"{arrivals} a round", "rounds": str(rounds)}
    tell("Placement of prompts", figures(seen), use, facts, json_file, markdown_file)


async def _measure(
    model: Path, dtype: KvDtype, tiers: Tiers, sweep: Sweep, on_progress: OnProgress
) -> dict[Point, Seen]:
    slot_tokens = min(longest_context(model), _SLOT_TOKENS)
    slots = max(point.streams + point.together for point in sweep.points) + 2
    flags = {"dtype": dtype, "num-slots": str(slots), "slot-tokens": str(slot_tokens)}
    seen = {point: Seen() for point in sweep.points}
    vocab, longest, seeds = vocabulary(model), slot_tokens - _RUNNING_TOKENS, itertools.count()
    async with AsyncExitStack() as stack:
        sources: dict[str, MeshSource] = {}
        for mode in MODES:
            on_progress(f"starting the mesh: {mode}")
            placed = replace(tiers, decode_flags=("--prefill-placement", mode))
            sources[mode] = await stack.enter_async_context(local_mesh(model, placed, flags))
            tokens = max(point.prompt_tokens for point in sweep.points)
            groups = [draw_prompts(1, tokens, vocab, next(seeds)) for _ in range(_WARM_UP)]
            await first_tokens(sources[mode], [], groups, longest=longest, pause=_PAUSE)
        for number, point in itertools.product(range(sweep.rounds), sweep.points):
            seed = next(seeds)
            for mode in MODES[number % len(MODES) :] + MODES[: number % len(MODES)]:
                on_progress(f"round {number + 1} of {sweep.rounds}: {point.name}, {mode}")
                running = draw_prompts(point.streams, _RUNNING_TOKENS, vocab, seed)
                prompts = draw_prompts(sweep.arrivals * point.together, point.prompt_tokens, vocab, seed + 1_000_000)
                groups = [prompts[i : i + point.together] for i in range(0, len(prompts), point.together)]
                source = sources[mode]
                source.placements.clear()
                source.ledgers.clear()
                waited = await first_tokens(source, running, groups, longest=longest, pause=_PAUSE)
                seen[point].ttft_ms[mode].append(waited)
                remote = source.placements.count(inference_pb2.PLACEMENT_REMOTE)
                seen[point].remote[mode].append(remote / max(1, len(source.placements)))
    return seen


def _numbers(text: str) -> list[int]:
    """Comma-separated.

    Raises:
        ValueError: something else.
    """
    return [int(part) for part in text.split(",")]
