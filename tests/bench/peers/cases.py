"""The questions every engine is asked: 1, 8 and 16 streams, one long prompt, and long prompts among running streams.

Standard library only, as `baton.bench.streams`: it runs in the other engines' environments.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import gc
import itertools
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from baton.bench.quiet import watched
from baton.bench.streams import Source, draw_prompts, stall, together

VOCAB = 32_000
CASES = ("one", "eight", "sixteen", "prefill", "mixed")
READY = "ready"
"""Said by a runner that is asked line by line, once it is loaded."""
_TOGETHER = {"one": (1, 128, 128), "eight": (8, 256, 64), "sixteen": (16, 256, 64), "prefill": (1, 2048, 1)}
"""Case: streams, prompt tokens, answer tokens."""


def parser() -> argparse.ArgumentParser:
    """What all runners can be told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--asked", action="store_true", help="take cases from standard input instead")
    parser.add_argument("--lock", type=Path, help="lock this file while measuring, not while loading")
    return parser


async def measure(source: Source, arguments: argparse.Namespace) -> AsyncIterator[dict[str, object]]:
    """What is asked for: line by line on standard input, or every case in turn, after one run that does not count."""
    if arguments.asked:
        async for case, seed in _asked():
            yield await once(source, case, seed)
        return
    seeds = itertools.count(1000 * arguments.seed)
    for number in range(arguments.rounds + 1):
        for case in arguments.cases:
            with alone(arguments.lock):
                result = await once(source, case, next(seeds))
            if number:
                yield result


async def once(source: Source, case: str, seed: int) -> dict[str, object]:
    """One case, and who used the processors meanwhile."""
    gc.collect()
    with watched() as use:
        result = await _one(source, case, seed)
    return {"case": case, "own": round(use.own, 2), "others": round(use.others, 2), **result}


async def _asked() -> AsyncIterator[tuple[str, int]]:
    """(case, seed) of every line on standard input: `eight 3`."""
    print(READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        case, seed = line.split()
        yield case, int(seed)


async def _one(source: Source, case: str, seed: int) -> dict[str, object]:
    if case == "mixed":
        running, arriving = (
            draw_prompts(4, 256, VOCAB, seed),
            draw_prompts(3, 2048, VOCAB, seed + 500),
        )
        return asdict(await stall(source, running, arriving, longest=1500))
    streams, prompt_tokens, answer_tokens = _TOGETHER[case]
    prompts = draw_prompts(streams, prompt_tokens, VOCAB, seed)
    return asdict(await together(source, prompts, answer_tokens))


@contextmanager
def alone(lock: Path | None, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Other measurements on this machine wait meanwhile, and this one for them.

    With LOCK_SH others may work as well, and only who measures waits.
    """
    if lock is None:
        yield
        return
    with lock.open("ab") as file:
        fcntl.flock(file, how)
        yield


def tell(result: dict[str, object]) -> None:
    """One line of JSON, as `compare` reads them."""
    json.dump(result, sys.stdout)
    print(flush=True)
