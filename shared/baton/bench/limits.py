"""The physical limits of this machine: what one core reaches alone, and all cores together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Final

from baton.bench import wire
from baton.bench.figures import Figure, Spread

OnProgress = Callable[[str], None]

MEMORY: Final = ("memcpy", "read")
PRODUCTS: Final = ("bfloat16", "float32", "int8")
_NAMES: Final = {"memcpy": "memcpy", "read": "memory read"}


class ProbeFailed(RuntimeError):
    """A probe's process ended without a result."""


def measure(model: Path, rounds: int, seconds: float, tokens: int, on_progress: OnProgress) -> list[Figure]:
    """All limits, each so many times, in turn.

    Args:
        model: whose shapes the matrix products have.
        rounds: repetitions.
        seconds: of one measurement.
        tokens: rows of the products.
        on_progress: told what is measured now.

    Raises:
        ProbeFailed: a measuring process ended early.
    """
    cores = sorted(os.sched_getaffinity(0))
    reached: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for kind in (*MEMORY, *PRODUCTS):
            for group in ([cores[0]], cores) if len(cores) > 1 else ([cores[0]],):
                on_progress(f"{kind}, {_cores(len(group))}")
                reached.setdefault((kind, len(group)), []).append(probe(kind, group, seconds, model, tokens))
        for name, carry in (("loopback TCP", wire.tcp), ("bare gRPC stream", wire.grpc_stream)):
            on_progress(name)
            reached.setdefault((name, 0), []).append(carry(round(seconds * 1e9)))
    return [_figure(kind, count, values, tokens) for (kind, count), values in sorted(reached.items(), key=_order)]


def probe(kind: str, cores: list[int], seconds: float, model: Path, tokens: int) -> float:
    """What one process on each of these cores reaches per second, together.

    Raises:
        ProbeFailed: a measuring process ended early.
    """
    with ExitStack() as stack:
        processes = []
        for core in cores:
            command = [sys.executable, "-m", "baton.bench.probe", kind, "--cpu", str(core)]
            command += ["--seconds", str(seconds), "--model", str(model), "--tokens", str(tokens)]
            processes.append(stack.enter_context(Popen(command, stdin=PIPE, stdout=PIPE, text=True)))
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise ProbeFailed(f"the measurement of {kind} ended with status {process.wait()}")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        total = 0.0
        for process in processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ProbeFailed(f"the measurement of {kind} ended with status {process.wait()}")
            total += float(line)
        return total


def _figure(kind: str, cores: int, values: list[float], tokens: int) -> Figure:
    if kind in PRODUCTS:
        name, unit = f"{kind} products of {tokens:,} rows, {_cores(cores)}", "GFLOP/s" if kind != "int8" else "GOP/s"
    else:
        name, unit = f"{_NAMES[kind]}, {_cores(cores)}" if cores else kind, "GB/s"
    return Figure(name, Spread.of(value / 1e9 for value in values), unit)


def _order(entry: tuple[tuple[str, int], list[float]]) -> tuple[int, int]:
    kinds = (*MEMORY, *PRODUCTS)
    (kind, cores), _ = entry
    return (kinds.index(kind) if kind in kinds else len(kinds)), cores


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"
