"""`baton bench streaming`: what a token costs on its way from the engine to the client."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Final

import typer

from baton.bench.figures import Figure, Spread
from baton.bench.hops import HopCost, hop_cost
from baton.bench.mesh_source import MeshSource
from baton.bench.relay import bare_relay
from baton.bench.streams import draw_prompts
from baton.bench.workload import vocabulary
from baton.cli import console
from baton.cli.bench.local_mesh import MESH_FAILURES, Tiers, local_mesh
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

_BARE: Final = {"router": "relay", "decode": "source"}
"""Which process of the bare relay stands beside which service."""

_SERVICES: Final = {"router": "router", "decode": "decode-0"}
"""Names of the processes that are looked at, and theirs in the mesh."""

_Seen = dict[int, list[tuple[HopCost, HopCost]]]
"""By number of streams, of each round: the mesh's, and the bare relay's."""


def streaming(
    model: Model = None,
    dtype: Dtype = KvDtype.FLOAT32,
    rounds: Rounds = 5,
    streams: Annotated[str, typer.Option(help="Requests at once, with commas between them.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 16,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 1,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure the processor time a token costs in the router and in decode's front, over whole answers.

    Beside each stands a bare gRPC relay with a message for each token at the same pace: the least a hop in Python can
    cost that batches nothing. Processor time is little moved by what else the machine does.
    """
    directory = model_directory(model)
    try:
        counts = [int(count) for count in streams.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        console.fail(f"--streams {streams!r} is not a list of numbers", code=2)
    flags = {"dtype": dtype, "num-slots": str(max(counts) + 4)}
    with measuring(*MESH_FAILURES) as (on_progress, use):
        local = local_mesh(directory, Tiers(None, threads=threads), flags)
        vocab = vocabulary(directory)
        seen = asyncio.run(_measure(local, counts, rounds, prompt_tokens, output_tokens, vocab, on_progress))
    facts = {"model": directory.name, "dtype": dtype, "threads": str(threads)}
    facts["streams"] = f"{prompt_tokens} tokens in, {output_tokens} out"
    tell("Streaming", _figures(seen), use, facts, json_file, markdown_file)


async def _measure(
    local: AbstractAsyncContextManager[MeshSource],
    counts: list[int],
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
    vocab: int,
    on_progress: OnProgress,
) -> _Seen:
    seen: _Seen = {count: [] for count in counts}
    on_progress("starting the mesh")
    async with local as mesh:
        services = {name: mesh.pids[process] for name, process in _SERVICES.items()}
        for number in range(rounds + 1):
            for count in counts:
                on_progress(f"round {number} of {rounds}, {count} streams")
                prompts = draw_prompts(count, prompt_tokens, vocab, 1_000 * number + count)
                meshed = await hop_cost(mesh, services, prompts, output_tokens)
                async with bare_relay(meshed.interval * meshed.tokens_per_message) as bare:
                    await hop_cost(bare, bare.pids, prompts, 8)  # the channels are made
                    alone = await hop_cost(bare, bare.pids, prompts, output_tokens)
                if number:
                    seen[count].append((meshed, alone))
    return seen


def _figures(seen: _Seen) -> list[Figure]:
    figures = []
    for count, rounds in seen.items():
        streams = "1 stream" if count == 1 else f"{count} streams"
        for service, process in _BARE.items():
            costs = [mesh.microseconds[service] for mesh, _ in rounds]
            limits = [bare.microseconds[process] for _, bare in rounds]
            shares = [limit / cost for cost, limit in zip(costs, limits, strict=True)]
            figures.append(
                Figure(
                    f"{streams}: {service}",
                    Spread.of(costs),
                    "µs of processor time per token",
                    Spread.of(limits),
                    "bare gRPC",
                    Spread.of(shares),
                )
            )
        figures.append(
            Figure(f"{streams}: message", Spread.of(mesh.tokens_per_message for mesh, _ in rounds), "tokens")
        )
        speeds = Spread.of(1 / mesh.interval for mesh, _ in rounds)
        figures.append(Figure(f"{streams}: pace of each", speeds, "tokens/s"))
    return figures
