"""What tracing costs: one load, in turn, on meshes with and without it, collectors working, down and stuck.

    python scripts/measure_tracing.py [--rounds 20] [--requests 120] [--concurrency 4]

Prints ratios to the mesh without tracing: throughput, p99 of time to first token and of time per token over all
requests of all rounds, and how much the memory of its services grew beyond what it grew there. All meshes run the whole
time and take turns, so a busy machine hurts all of them alike; intervals are 95 %, from drawing rounds anew.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import grpc
import psutil
import typer
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from baton.bench.load import Asking, Generator, Load, Progress, Run, precise_loop
from baton.bench.report import percentile
from baton.bench.workload import Lengths, Workload
from baton.cli.plan import Plan
from baton.cli.stack import Stack
from baton.models import bundled_model
from baton.v1 import inference_pb2_grpc

SERVICES: Final = ("router", "cache", "prefill", "decode")
NOBODY: Final = "http://127.0.0.1:9"
DRAWS: Final = 1000


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and counts them, or takes them and never answers."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.spans = 0
        self._stuck = stuck

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        if self._stuck:
            await asyncio.Event().wait()
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(slots=True)
class Mesh:
    """A running mesh and what was measured on it, a value per round."""

    target: str
    processes: list[psutil.Process]
    tokens_per_second: list[float] = field(default_factory=list)
    ttft_ns: list[list[float]] = field(default_factory=list)
    tpot_ns: list[list[float]] = field(default_factory=list)
    grown_bytes: int = 0

    def memory(self) -> int:
        """Resident bytes of all its processes, engines included."""
        return sum(p.memory_info().rss for parent in self.processes for p in (parent, *parent.children(recursive=True)))

    def take(self, run: Run) -> None:
        """One round's results."""
        good = [record for record in run.records if record.ok]
        assert len(good) == len(run.records), [record.code for record in run.records if not record.ok]
        seconds = (max(record.done_ns for record in good) - run.began_ns) / 1e9
        self.tokens_per_second.append(sum(record.output_tokens for record in good) / seconds)
        self.ttft_ns.append([value for record in good if (value := record.ttft_ns()) is not None])
        self.tpot_ns.append([pace for record in good if (pace := record.tpot_ns()) is not None])


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each mesh.")] = 20,
    requests: Annotated[int, typer.Option(min=20, help="Requests a turn.")] = 120,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
) -> None:
    """Measure what tracing costs."""
    console = Console(width=100)
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        meshes, spans = runner.run(_measure(rounds, requests, concurrency))
    table = Table(box=None, header_style="dim")
    for title in ("mesh", "tokens/s", "TTFT p99", "TPOT p99", "memory"):
        table.add_column(title, justify="left" if title == "mesh" else "right", no_wrap=True)
    off = meshes.pop("off")
    for name, mesh in meshes.items():
        grown = (mesh.grown_bytes - off.grown_bytes) / 2**20
        table.add_row(name, *(_cell(ratios) for ratios in _ratios(mesh, off)), f"{grown:+.1f} MiB")
    console.print(f"ratios to no tracing, {rounds} rounds of {requests} requests; 95 % intervals")
    console.print(table)
    console.print(f"{spans} spans arrived")


async def _measure(rounds: int, requests: int, concurrency: int) -> tuple[dict[str, Mesh], int]:
    async with AsyncExitStack() as stack:
        collector = Collector()
        working = await stack.enter_async_context(_serve(collector))
        stuck = await stack.enter_async_context(_serve(Collector(stuck=True)))
        endpoints = {"off": "", "collector": working, "collector down": NOBODY, "collector stuck": stuck}
        meshes = {name: await stack.enter_async_context(_mesh(endpoint)) for name, endpoint in endpoints.items()}
        for mesh in meshes.values():
            await _load(mesh.target, requests, concurrency, seed=0)
            mesh.grown_bytes = -mesh.memory()
        names = list(meshes)
        for turn in track(range(rounds), description="rounds", console=Console(stderr=True)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                meshes[name].take(await _load(meshes[name].target, requests, concurrency, seed=turn + 1))
        for mesh in meshes.values():
            mesh.grown_bytes += mesh.memory()
    return meshes, collector.spans


@asynccontextmanager
async def _serve(collector: Collector) -> AsyncIterator[str]:
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def _mesh(endpoint: str) -> AsyncIterator[Mesh]:
    flags = ("--otlp-endpoint", endpoint) if endpoint else ()
    plan = Plan(
        model=bundled_model(),
        prefill=1,
        decode=1,
        listen="127.0.0.1:0",
        redis_url="",
        extra=dict.fromkeys(SERVICES, flags),
    )
    stack = Stack(plan, None, 120.0, lambda process, line: None)
    try:
        target = (await stack.start()).router
        yield Mesh(target, [psutil.Process(service.pid) for service in stack.services])
    finally:
        await stack.stop()


async def _load(target: str, requests: int, concurrency: int, seed: int) -> Run:
    load = Load(rate=None, concurrency=concurrency, requests=requests, duration=None, warmup=2)
    asking = Asking(model="", temperature=1.0, ignore_eos=True, bypass_cache=True, timeout=60.0)
    workload = Workload(Lengths.parse("64-256"), Lengths.parse("32"), 2048, 2048, 0, ())
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return await Generator(stub, asking, workload.jobs(seed), Progress()).run(load, seed)


def _ratios(with_it: Mesh, without: Mesh) -> list[tuple[float, float, float]]:
    """Tokens per second, p99 of TTFT, p99 of TPOT: each ratio, and its interval."""

    def ratios(turns: Sequence[int]) -> list[float]:
        speed = statistics.median(with_it.tokens_per_second[i] / without.tokens_per_second[i] for i in turns)
        return [
            speed,
            _p99(with_it.ttft_ns, turns) / _p99(without.ttft_ns, turns),
            _p99(with_it.tpot_ns, turns) / _p99(without.tpot_ns, turns),
        ]

    turns = range(len(without.tokens_per_second))
    rng = random.Random(0)
    drawn = [
        sorted(column) for column in zip(*(ratios(rng.choices(turns, k=len(turns))) for _ in range(DRAWS)), strict=True)
    ]
    return [
        (ratio, percentile(column, 2.5), percentile(column, 97.5))
        for ratio, column in zip(ratios(turns), drawn, strict=True)
    ]


def _p99(rounds: Sequence[Sequence[float]], turns: Sequence[int]) -> float:
    return percentile(sorted(value for turn in turns for value in rounds[turn]), 99)


def _cell(ratio: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.2f} {:.2f}]".format(*ratio)


if __name__ == "__main__":
    typer.run(main)
