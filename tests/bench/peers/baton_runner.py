"""Baton itself, asked what the others are asked:

    python -m tests.bench.peers.baton_runner --model DIR --shape engine|mesh|divided [--cases one,eight] [--rounds 3]

engine: one engine in a process of its own, both cores, no network. mesh: all services without a prefill worker, one
decode worker on both cores, through the router. divided: prefill and decode on a core each, through the router.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from baton.bench.engine_source import EngineSource
from baton.bench.streams import Source
from baton.cli.bench.local_mesh import Tiers, local_mesh
from baton.engine.client import EngineClient
from baton.engine.config import EngineConfig, Quantization
from baton.engine.layout import KvDtype
from tests.bench.peers.cases import measure, parser, tell

LONGEST = 4096
"""Tokens of one request, as the others are told."""
SLOTS = 20


@asynccontextmanager
async def engine(arguments: argparse.Namespace) -> AsyncIterator[Source]:
    """One engine, no network."""
    config = EngineConfig(
        model=Path(arguments.model),
        dtype=KvDtype.BFLOAT16,
        num_slots=SLOTS,
        slot_tokens=LONGEST,
        threads=os.cpu_count() or 1,
        quantization=Quantization(arguments.quantization),
        **({"step_tokens": arguments.step_tokens} if arguments.step_tokens else {}),
    )
    client = await EngineClient.start(config, own_cores=True)
    try:
        yield EngineSource(client)
    finally:
        await client.close()


def mesh(arguments: argparse.Namespace, *, divided: bool) -> AbstractAsyncContextManager[Source]:
    """All services, through the router."""
    flags = {"dtype": "bfloat16", "num-slots": str(SLOTS), "slot-tokens": str(LONGEST)}
    if arguments.step_tokens:
        flags["step-tokens"] = str(arguments.step_tokens)
    tiers = Tiers("0", "1", threads=1) if divided else Tiers(None, threads=os.cpu_count() or 1)
    return local_mesh(Path(arguments.model), tiers, flags)


async def run(arguments: argparse.Namespace) -> None:
    """Load, measure, tell."""
    shape = engine(arguments) if arguments.shape == "engine" else mesh(arguments, divided=arguments.shape == "divided")
    async with shape as source:
        async for result in measure(source, arguments):
            tell(result)


def main() -> None:
    """Parse the command line."""
    options = parser()
    options.add_argument("--shape", choices=("engine", "mesh", "divided"), default="engine")
    options.add_argument("--step-tokens", type=int, default=0, help="token budget of a step; 0: Baton's default")
    options.add_argument("--quantization", choices=list(Quantization), default="none", help="of the engine alone")
    asyncio.run(run(options.parse_args()))


if __name__ == "__main__":
    main()
