"""One core's limit in a process of its own: `python -m baton.bench.probe memcpy --cpu 0 --seconds 0.5`.

Says "ready" when its memory is filled, begins at a line on standard input, and prints what it reached per second: so
several begin together.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from baton.bench.linears import LinearLayers
from baton.bench.shapes import read_linears
from baton.worker.cpus import parse_cpus, pin

MEMORY: Final = ("memcpy", "read")
"""Kinds in bytes per second."""
PRODUCTS: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
"""Kinds in operations per second: matrix products of these."""
_BYTES: Final = 256 * 1024 * 1024
"""Far beyond any cache."""


def main() -> None:
    """Parse, prepare, wait, measure, tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=[*MEMORY, *PRODUCTS])
    parser.add_argument("--cpu", required=True, help="core to run on")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--model", type=Path, help="whose shapes to multiply")
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the products")
    arguments = parser.parse_args()
    pin(parse_cpus(arguments.cpu))
    torch.set_num_threads(1)
    work, amount = _work(arguments.kind, arguments.model, arguments.tokens)
    work()
    print("ready", flush=True)
    sys.stdin.readline()
    print(_per_second(work, amount, arguments.seconds), flush=True)


def _work(kind: str, model: Path | None, tokens: int) -> tuple[Callable[[], object], float]:
    """What to repeat, and how much it is: bytes or operations."""
    if kind in MEMORY:
        source = torch.randn(_BYTES // 4)
        if kind == "read":
            return lambda: torch.dot(source, source), float(_BYTES)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), float(_BYTES)
    if model is None:
        raise SystemExit("--model is needed: products have its shapes")
    linears = read_linears(model)
    layers = LinearLayers(linears, PRODUCTS[kind])
    return lambda: layers.once(tokens, 0), linears.flops(tokens, 0)


def _per_second(work: Callable[[], object], amount: float, seconds: float) -> float:
    times, spent, began = 0, 0.0, time.perf_counter()
    while spent < seconds:
        work()
        times += 1
        spent = time.perf_counter() - began
    return amount * times / spent


if __name__ == "__main__":
    main()
