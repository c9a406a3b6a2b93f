"""`baton bench load`: load on a router, and what it did to latency."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
from rich.live import Live
from rich.text import Text

from baton import __version__
from baton.bench import present
from baton.bench.load import Asking, Generator, Load, Progress, precise_loop
from baton.bench.report import Objectives, Report, report
from baton.bench.workload import BadLengths, Lengths, Workload
from baton.cli import connection, console
from baton.cli.mesh import router_or_default
from baton.client import BatonRpcError, ModelInfo
from baton.v1 import inference_pb2_grpc

_LAG_REFUSED: Final = 3
_DEFAULT_REQUESTS: Final = 100
_DEFAULT_CONCURRENCY: Final = 4


def load(
    target: console.Target = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Open loop: requests per second, Poisson.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Closed loop: requests in flight.", show_default="4")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests to make.", show_default="100")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds to send for.")] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Random prompts' lengths: 128, 64-256, or 128~0.5 (median and sigma).")
    ] = "128",
    output_tokens: Annotated[str, typer.Option(help="Answers' lengths, in the same forms.")] = "32",
    shared_prefix: Annotated[int, typer.Option(min=0, help="First tokens all random prompts share.")] = 0,
    prompts: Annotated[Path | None, typer.Option(help="Ask this file's lines in turn instead.")] = None,
    model: Annotated[str, typer.Option(help="Model name. Needed only where several are served.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed makes the same requests at the same times.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests made first and not measured.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds one request may take.")] = 300.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Objective for goodput: TTFT.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Objective for goodput: time per output token.")] = None,
    slo_e2e_ms: Annotated[float | None, typer.Option(help="Objective for goodput: end to end.")] = None,
    use_cache: Annotated[bool, typer.Option("--use-cache", help="Let the response cache answer.")] = False,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Answers may end early.")] = False,
    allow_lag: Annotated[bool, typer.Option("--allow-lag", help="Accept a result the generator made late.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here; - prints them instead of the tables.")
    ] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
) -> None:
    """Measure latency and throughput under load.

    Reports TTFT, ITL, TPOT, end-to-end latency, tokens/s and requests/s. The response cache is bypassed unless you say
    so. Open-loop latency counts from the scheduled send time. Exit code 3 when the generator itself was too late (lag
    p99 above 5 ms), 1 when no request ended well.
    """
    if rate is not None and concurrency is not None:
        console.fail("--rate is an open loop, --concurrency a closed one: choose", code=2)
    if rate is None and concurrency is None:
        concurrency = _DEFAULT_CONCURRENCY
    if requests is None and duration is None:
        requests = _DEFAULT_REQUESTS
    wanted = Load(rate=rate, concurrency=concurrency, requests=requests, duration=duration, warmup=warmup)
    asking = Asking(
        model=model,
        temperature=temperature,
        ignore_eos=not stop_at_eos,
        bypass_cache=not use_cache,
        timeout=timeout,
    )
    try:
        lengths = Lengths.parse(prompt_tokens), Lengths.parse(output_tokens)
        texts = _texts(prompts)
    except (BadLengths, OSError) as error:
        console.fail(str(error), code=2)
    address = router_or_default(target)
    with console.rpc_errors(address), asyncio.Runner(loop_factory=precise_loop) as runner:
        info = runner.run(_model(address, model))
        workload = Workload(*lengths, info.vocab_size, info.max_context, shared_prefix, texts)
        objectives = Objectives(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms)
        result = runner.run(_measure(address, wanted, asking, workload, objectives, seed))
    values = result.to_json() | _circumstances(info, asking, workload, seed)
    _tell(result, values, json_file, markdown_file)
    if result.completed == 0:
        console.fail("no request ended well")
    if not result.lag_acceptable and not allow_lag:
        console.fail(
            present.lag_refusal(result), hint="Lower the load, or accept it with --allow-lag.", code=_LAG_REFUSED
        )


async def _model(target: str, name: str) -> ModelInfo:
    async with connection.async_client(target, 10.0) as client:
        models = await client.models()
    for info in models:
        if name in ("", info.name):
            return info
    raise BatonRpcError(grpc.StatusCode.NOT_FOUND, f"no model {name!r} at {target}" if models else "no model is served")


async def _measure(
    target: str, load: Load, asking: Asking, workload: Workload, objectives: Objectives, seed: int
) -> Report:
    progress = Progress()
    async with connection.channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with _shown(progress, load):
            run = await Generator(stub, asking, workload.jobs(seed), progress).run(load, seed)
    return report(run, load, objectives)


@contextmanager
def _shown(progress: Progress, load: Load) -> Iterator[None]:
    """One line while it runs. Drawn twice a second only: drawing takes from the time the generator has."""
    if not console.err.is_terminal:
        yield
        return

    class Line:
        def __rich__(self) -> Text:
            goal = f" of {load.requests}" if load.requests is not None else ""
            failed = f", {progress.failed} failed" if progress.failed else ""
            return Text(f"{progress.done}{goal} done, {progress.sent - progress.done} in flight{failed}", style="dim")

    with Live(Line(), console=console.err, refresh_per_second=2, transient=True):
        yield


def _texts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    texts = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not texts:
        raise BadLengths(f"{path} holds no prompt: one a line")
    return texts


def _circumstances(info: ModelInfo, asking: Asking, workload: Workload, seed: int) -> dict[str, Any]:
    """What the numbers depend on besides the load."""
    return {
        "baton": __version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "model": info.name,
        "dtype": info.dtype,
        "workload": {
            "prompt_tokens": None if workload.prompts else workload.prompt_tokens.text,
            "prompts": len(workload.prompts),
            "output_tokens": workload.output_tokens.text,
            "shared_prefix": workload.shared_prefix,
            "temperature": asking.temperature,
            "response_cache": not asking.bypass_cache,
            "seed": seed,
        },
    }


def _tell(result: Report, values: dict[str, Any], json_file: Path | None, markdown_file: Path | None) -> None:
    text = json.dumps(values, indent=2) + "\n"
    if json_file == Path("-"):
        print(text, end="")
    else:
        if json_file is not None:
            json_file.write_text(text, encoding="utf-8")
        facts, latencies = present.tables(result)
        console.out.print(facts)
        console.out.print()
        console.out.print(latencies)
    if markdown_file is not None:
        markdown_file.write_text(present.markdown(result), encoding="utf-8")
