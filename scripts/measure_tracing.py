"""What tracing costs: one load, in turn, on a mesh without it, with a collector, and with a collector that is down.

    python scripts/measure_tracing.py [--rounds 8] [--requests 120] [--concurrency 4]

Prints ratios to the mesh without tracing, medians over the rounds: throughput, and p99 of time to first token and of
time per token. All three meshes run the whole time and take turns, so a busy machine hurts all of them alike.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

import grpc
import typer
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console
from rich.progress import track
from rich.table import Table

from baton.bench.load import Asking, Generator, Load, Progress, precise_loop
from baton.bench.report import Objectives, Report, report
from baton.bench.workload import Lengths, Workload
from baton.cli.plan import Plan
from baton.cli.stack import Stack
from baton.models import bundled_model
from baton.v1 import inference_pb2_grpc

SERVICES = ("router", "cache", "prefill", "decode")
NOBODY = "http://127.0.0.1:9"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans and counts them."""

    def __init__(self) -> None:
        self.spans = 0

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each mesh.")] = 8,
    requests: Annotated[int, typer.Option(min=20, help="Requests a turn.")] = 120,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
) -> None:
    """Measure what tracing costs."""
    console = Console()
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        figures, spans = runner.run(_measure(rounds, requests, concurrency))
    table = Table(box=None, header_style="dim")
    for title in ("mesh", "tokens/s", "TTFT p99", "TPOT p99"):
        table.add_column(title, justify="left" if title == "mesh" else "right")
    for name in ("collector", "collector down"):
        table.add_row(name, *(f"{ratio:.3f}" for ratio in _ratios(figures[name], figures["off"])))
    console.print("ratios to no tracing, medians over the rounds")
    console.print(table)
    console.print(f"{spans} spans arrived")


async def _measure(rounds: int, requests: int, concurrency: int) -> tuple[dict[str, list[Report]], int]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    endpoints = {"off": "", "collector": f"http://127.0.0.1:{port}", "collector down": NOBODY}
    figures: dict[str, list[Report]] = {name: [] for name in endpoints}
    async with AsyncExitStack() as stack:
        meshes = {name: await stack.enter_async_context(_mesh(endpoint)) for name, endpoint in endpoints.items()}
        for target in meshes.values():
            await _load(target, requests // 2, concurrency, seed=0)
        names = list(meshes)
        for turn in track(range(rounds), description="rounds", console=Console(stderr=True)):
            for name in names[turn % 3 :] + names[: turn % 3]:
                figures[name].append(await _load(meshes[name], requests, concurrency, seed=turn + 1))
    await server.stop(0)
    return figures, collector.spans


@asynccontextmanager
async def _mesh(endpoint: str) -> AsyncIterator[str]:
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
        yield (await stack.start()).router
    finally:
        await stack.stop()


async def _load(target: str, requests: int, concurrency: int, seed: int) -> Report:
    load = Load(rate=None, concurrency=concurrency, requests=requests, duration=None, warmup=2)
    asking = Asking(model="", temperature=1.0, ignore_eos=True, bypass_cache=True, timeout=60.0)
    workload = Workload(Lengths.parse("64-256"), Lengths.parse("32"), 2048, 2048, 0, ())
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        run = await Generator(stub, asking, workload.jobs(seed), Progress()).run(load, seed)
    return report(run, load, Objectives(None, None, None))


def _ratios(with_it: list[Report], without: list[Report]) -> list[float]:
    """Medians of the rounds' ratios: tokens per second, p99 of TTFT, p99 of TPOT."""

    def figure(result: Report) -> tuple[float, float, float]:
        assert result.ttft is not None
        assert result.tpot is not None
        return result.tokens_per_second, result.ttft.percentiles[99], result.tpot.percentiles[99]

    pairs = [
        [a / b for a, b in zip(figure(one), figure(other), strict=True)]
        for one, other in zip(with_it, without, strict=True)
    ]
    return [statistics.median(column) for column in zip(*pairs, strict=True)]


if __name__ == "__main__":
    typer.run(main)
