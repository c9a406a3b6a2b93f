"""`baton bench mesh`: what the mesh costs on top of its engine."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer

from baton.bench.accounts import FirstToken
from baton.bench.engine_source import EngineSource
from baton.bench.figures import Figure, Spread, rate
from baton.bench.streams import Source, draw_prompts, together
from baton.bench.workload import vocabulary
from baton.cli.bench.local_mesh import MESH_FAILURES, Tiers, local_mesh
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
from baton.engine.client import EngineClient
from baton.engine.config import EngineConfig
from baton.engine.errors import EngineError
from baton.engine.layout import KvDtype

SHARE_WANTED: Final = 0.95
"""Of the engine's own tokens/s, through the mesh."""
ORCHESTRATION_ALLOWED: Final = 5.0
"""Milliseconds of a first token that are neither computing nor moving bytes."""


@dataclass(slots=True)
class _Seen:
    """One value for each round."""

    mesh: list[float] = field(default_factory=list)
    """Tokens/s through the mesh."""
    engine: list[float] = field(default_factory=list)
    """Tokens/s of the engine without it."""
    ttft: list[float] = field(default_factory=list)
    engine_ttft: list[float] = field(default_factory=list)
    parts: list[FirstToken] = field(default_factory=list)


def mesh(
    model: Model = None,
    dtype: Dtype = KvDtype.BFLOAT16,
    rounds: Rounds = 5,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure what the mesh takes from its engine: client, router and decode beside the same engine without them.

    The two take turns. Tokens/s count from the moment all streams run; TTFT and its parts are those of single requests,
    from their ledgers. Exit code 4 when more is lost than wanted.
    """
    directory = model_directory(model)
    config = EngineConfig(model=directory, dtype=dtype, num_slots=streams + 4, threads=threads or all_cores())
    with measuring(EngineError, *MESH_FAILURES) as (on_progress, use):
        seen = asyncio.run(_measure(config, rounds, streams, prompt_tokens, output_tokens, on_progress))
    facts = {"model": directory.name, "dtype": dtype, "threads": str(config.threads)}
    facts["streams"] = f"{streams} of {prompt_tokens} tokens in, {output_tokens} out"
    tell("The mesh and its engine", _figures(seen, streams), use, facts, json_file, markdown_file)


async def _measure(
    config: EngineConfig, rounds: int, streams: int, prompt_tokens: int, output_tokens: int, on_progress: OnProgress
) -> _Seen:
    seen = _Seen()
    vocab = vocabulary(config.model)
    flags = {"dtype": config.dtype.value, "num-slots": str(config.num_slots)}
    async with AsyncExitStack() as stack:
        on_progress("starting the engine")
        client = await EngineClient.start(config)
        stack.push_async_callback(client.close)
        alone = EngineSource(client)
        on_progress("starting the mesh")
        meshed = await stack.enter_async_context(local_mesh(config.model, Tiers(None, threads=config.threads), flags))
        for number in range(rounds + 1):
            on_progress(f"round {number} of {rounds}")
            prompts = draw_prompts(streams, prompt_tokens, vocab, number)
            speeds: dict[Source, float] = {}
            # The one that begins changes, so that neither profits from its place.
            for source in (alone, meshed) if number % 2 else (meshed, alone):
                speeds[source] = (await together(source, prompts, output_tokens)).decode_tokens_per_second
            single = draw_prompts(1, prompt_tokens, vocab, number + 10_000)
            alone_ttft = (await together(alone, single, 4)).ttft_ms
            meshed.ledgers.clear()
            meshed_ttft = (await together(meshed, single, 4)).ttft_ms
            if number:
                seen.engine.append(speeds[alone])
                seen.mesh.append(speeds[meshed])
                seen.engine_ttft.append(alone_ttft)
                seen.ttft.append(meshed_ttft)
                seen.parts += [FirstToken.of(ledger) for ledger in meshed.ledgers]
    return seen


def _figures(seen: _Seen, streams: int) -> list[Figure]:
    orchestration = Spread.of(part.orchestration for part in seen.parts)
    share = Spread.of(ORCHESTRATION_ALLOWED / max(1e-6, part.orchestration) for part in seen.parts)
    limit = Spread.of([ORCHESTRATION_ALLOWED])
    return [
        rate(f"{streams} streams through the mesh", seen.mesh, "tokens/s", seen.engine, "engine alone", SHARE_WANTED),
        Figure("TTFT through the mesh", Spread.of(seen.ttft), "ms"),
        Figure("TTFT of the engine alone", Spread.of(seen.engine_ttft), "ms"),
        Figure("TTFT: compute", Spread.of(part.compute for part in seen.parts), "ms"),
        Figure("TTFT: wire", Spread.of(part.wire for part in seen.parts), "ms"),
        Figure("TTFT: orchestration", orchestration, "ms", limit, "allowed", share, 1.0),
    ]
