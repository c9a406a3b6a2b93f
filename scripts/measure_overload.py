"""What too many requests, and deadlines that pass, do to a mesh. Real services on this machine, open-loop load.

    .venv/bin/python scripts/measure_overload.py overload --seconds 20
    .venv/bin/python scripts/measure_overload.py deadlines --seconds 20
    .venv/bin/python scripts/measure_overload.py cancelled

`overload`: goodput (answers whose first token came within the SLO, per second) at rising rates, then at three times the
rate at which it peaked, then at 0.7 of that rate: how long until all is as before. Every request has a deadline.

`deadlines`: so many streams run, from another process; beside them, requests whose deadlines pass at any moment. How
long after the deadline the status came, and how late this process' own event loop was: a status cannot be seen sooner
than that. Afterwards nothing may be left at the workers. (`streams` is that other process.)

`cancelled`: ten long prompts are asked and cancelled, and then a short one: how much later than on an idle mesh its
first token comes, beside what one chunk of a long prompt takes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import grpc

from baton.bench.load import Asking, Generator, Load, Progress, Run, heartbeat, precise_loop
from baton.bench.record import Record
from baton.bench.workload import Job
from baton.cli.plan import Plan
from baton.cli.stack import Stack
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.models import bundled_model
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

WINDOW = 2.0
"""Seconds over which goodput is looked at after the overload."""


class Mesh:
    """A router and its workers."""

    def __init__(
        self,
        target: str,
        stub: inference_pb2_grpc.InferenceAsyncStub,
        workers: Sequence[str],
        options: argparse.Namespace,
    ) -> None:
        self.target = target
        self.stub = stub
        self._workers = workers
        self._options = options
        self._seed = itertools.count(1)

    def jobs(self, seed: int) -> Iterator[Job]:
        """Endless, and never the same twice."""
        chance = random.Random(seed)

        while True:
            prompt = tuple(chance.randint(16, 400) for _ in range(chance.randint(8, self._options.prompt)))
            yield Job(prompt, chance.randint(8, self._options.answer), next(self._seed))

    async def load(self, load: Load, timeout: float) -> Run:
        """Make these requests."""
        seed = next(self._seed)
        generator = Generator(self.stub, Asking(timeout=timeout, temperature=1.0), self.jobs(seed), Progress())
        return await generator.run(load, seed)

    async def left(self) -> int:
        """Requests that the workers' engines still have."""
        count = 0
        for address in self._workers:
            async with grpc.aio.insecure_channel(address) as channel:
                state = await worker_pb2_grpc.WorkerStub(channel).DebugState(worker_pb2.DebugStateRequest())
                count += len(state.engine_requests)
        return count


@asynccontextmanager
async def a_mesh(options: argparse.Namespace) -> AsyncIterator[Mesh]:
    """Started for the length of the block. Who waited longer than most of the SLO would not meet it."""
    queue, ahead = f"{0.6 * options.slo:g}", f"{0.3 * options.slo:g}"
    flags = ("--max-queue-seconds", queue, "--prefill-ahead-seconds", ahead, "--max-in-flight", "4096")
    plan = Plan(
        bundled_model(),
        prefill=1,
        decode=1,
        listen="127.0.0.1:0",
        redis_url="",
        engine={"num-slots": str(options.slots), "step-tokens": str(options.step_tokens)},
        extra={"router": flags},
    )
    stack = Stack(plan, None, 180.0, lambda process, line: None)
    try:
        addresses = await stack.start()
        async with grpc.aio.insecure_channel(addresses.router) as channel:
            workers = [service.admin for service in addresses.services if service.service in ("decode", "prefill")]
            yield Mesh(addresses.router, inference_pb2_grpc.InferenceStub(channel), workers, options)
    finally:
        await stack.stop()


def in_time(record: Record, slo: float) -> bool:
    """Whether it met the SLO."""
    first = record.ttft_ns()
    return record.ok and first is not None and first <= slo * 1e9


def p99(values: Sequence[float]) -> float:
    """Nearest rank; 0 of nothing."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)] if values else 0.0


async def overload(options: argparse.Namespace) -> None:
    """Peak, three times as much, and after."""
    async with a_mesh(options) as mesh:
        closed = await mesh.load(Load(concurrency=options.slots, duration=options.seconds / 2, warmup=5), 60)
        rate = sum(record.ok for record in closed.records) / (options.seconds / 2)
        print(f"closed loop, {options.slots} at once: {rate:.1f} answers/s")
        peak, best = 0.0, rate
        for share in (0.6, 0.8, 1.0, 1.2):
            goodput = await _phase(mesh, f"{share:.1f}x", rate * share, options.seconds, options)
            peak, best = max((peak, best), (goodput, rate * share))
        over = await _phase(mesh, "3x", 3 * best, options.overload_seconds or options.seconds, options)
        print(f"goodput at 3x: {over / peak:.0%} of the peak of {peak:.1f}/s at {best:.1f}/s")
        started = time.monotonic_ns()
        after = await mesh.load(Load(rate=0.7 * best, duration=40), options.deadline)
        bad = [r.scheduled_ns for r in after.records if not in_time(r, options.slo)]
        windows = sorted({int((at - started) / 1e9 // WINDOW) for at in bad})
        counts = {w: sum(int((at - started) / 1e9 // WINDOW) == w for at in bad) for w in windows}
        normal = max((w + 1 for w in windows if counts[w] > 0.05 * 0.7 * best * WINDOW), default=0) * WINDOW
        print(f"normal again (95 % in time) after {normal:g} s; {len(bad)} of {len(after.records)} not in time")
        await asyncio.sleep(0.5)
        print(f"left at the workers: {await mesh.left()}")


async def _phase(mesh: Mesh, name: str, rate: float, seconds: float, options: argparse.Namespace) -> float:
    """One rate: prints a line, returns the goodput."""
    run = await mesh.load(Load(rate=rate, duration=seconds), options.deadline)
    good = sum(in_time(record, options.slo) for record in run.records)
    codes: dict[str, int] = {}
    for record in run.records:
        codes[record.code] = codes.get(record.code, 0) + 1
    refused = [record.e2e_ns() / 1e6 for record in run.records if record.code == "RESOURCE_EXHAUSTED"]
    lag = p99([lag / 1e6 for lag in run.loop_lag_ns])
    print(
        f"{name:>5}: {rate:6.1f}/s asked, goodput {good / seconds:6.1f}/s, {codes}; "
        f"refused after {p99(refused):.0f} ms p99; own loop late {lag:.0f} ms p99",
        flush=True,
    )
    return good / seconds


async def cancelled(options: argparse.Namespace) -> None:
    """Short requests after cancelled long ones."""
    async with a_mesh(options) as mesh:
        chance = random.Random(1)

        def request(tokens: int) -> inference_pb2.StreamGenerateRequest:
            return inference_pb2.StreamGenerateRequest(
                token_ids=sampling_pb2.TokenIds(ids=[chance.randint(16, 400) for _ in range(tokens)]),
                sampling=sampling_pb2.SamplingParams(max_tokens=4, ignore_eos=True, temperature=1),
            )

        async def first_token() -> float:
            began = time.monotonic()
            async for message in mesh.stub.StreamGenerate(request(16), timeout=60):
                if message.chunk.token_ids:
                    return (time.monotonic() - began) * 1e3
            raise AssertionError("no token")

        for _ in range(20):
            await first_token()
        idle, after, whole = [], [], []
        for _ in range(options.rounds):
            idle.append(await first_token())
            began = time.monotonic()
            [message async for message in mesh.stub.StreamGenerate(request(1500), timeout=60)]
            whole.append((time.monotonic() - began) * 1e3)
            calls = [mesh.stub.StreamGenerate(request(1500), timeout=60) for _ in range(10)]
            await asyncio.sleep(chance.uniform(0.05, 0.1))
            for call in calls:
                call.cancel()
            after.append(await first_token())
            await asyncio.sleep(0.1)
        middle = [sorted(values)[len(values) // 2] for values in (idle, after, whole)]
        print(
            f"first token of a short request: {middle[0]:.1f} ms on an idle mesh (p50 of {len(idle)}; "
            f"p99 {p99(idle):.1f})"
        )
        print(f"after ten cancelled long ones: {middle[1]:.1f} ms p50, {p99(after):.1f} ms p99")
        print(
            f"one long one alone: {middle[2]:.1f} ms, in chunks of {options.step_tokens} tokens: "
            f"about {middle[2] / -(-1500 // options.step_tokens):.1f} ms each"
        )


async def streams(options: argparse.Namespace) -> None:
    """Nothing but load on a running mesh."""
    async with grpc.aio.insecure_channel(options.target) as channel:
        mesh = Mesh(options.target, inference_pb2_grpc.InferenceStub(channel), [], options)
        await mesh.load(Load(concurrency=options.streams, duration=options.seconds), 120)


async def deadlines(options: argparse.Namespace) -> None:
    """Streams, and requests that end by their deadlines."""
    async with a_mesh(options) as mesh:
        lags: list[int] = []
        late: list[float] = []
        partial = 0
        beating = asyncio.create_task(heartbeat(lags))
        background = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "streams", "--target", mesh.target,
            *(f"--{name}={getattr(options, name)}" for name in ("seconds", "streams", "prompt", "answer")),
        )  # fmt: skip
        chance = random.Random(1)
        await asyncio.sleep(4)
        end = time.monotonic() + options.seconds - 5

        async def probe() -> None:
            nonlocal partial
            while time.monotonic() < end:
                request = inference_pb2.StreamGenerateRequest(
                    token_ids=sampling_pb2.TokenIds(
                        ids=[chance.randint(16, 400) for _ in range(chance.randint(8, 160))]
                    ),
                    sampling=sampling_pb2.SamplingParams(max_tokens=400, ignore_eos=True, temperature=1),
                )
                timeout = chance.uniform(0.3, 2.0)
                due = time.monotonic() + timeout
                tokens = 0
                try:
                    async for message in mesh.stub.StreamGenerate(request, timeout=timeout):
                        tokens += len(message.chunk.token_ids)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                        late.append((time.monotonic() - due) * 1e3)
                        partial += tokens > 0

        await asyncio.gather(*(probe() for _ in range(4)))
        await background.wait()
        beating.cancel()
        print(f"{len(late)} deadlines passed beside {options.streams} streams, {partial} with tokens delivered")
        print(
            f"status after the deadline: p50 {sorted(late)[len(late) // 2]:.1f} ms, p99 {p99(late):.1f} ms, "
            f"max {max(late):.1f} ms"
        )
        print(
            f"this process' event loop: late by {p99([lag / 1e6 for lag in lags]):.1f} ms p99, "
            f"{max(lags) / 1e6:.1f} ms max"
        )
        await asyncio.sleep(0.5)
        print(f"left at the workers: {await mesh.left()}")


def main() -> None:
    """Run a part."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("overload", "deadlines", "cancelled", "streams"))
    parser.add_argument("--target", default="", help="of a running mesh, for `streams`")
    parser.add_argument("--seconds", type=float, default=20, help="of each phase")
    parser.add_argument("--overload-seconds", type=float, default=0, help="of the overload; 0: as the others")
    parser.add_argument("--slo", type=float, default=1.0, help="seconds to the first token")
    parser.add_argument("--deadline", type=float, default=10.0, help="of a request, seconds")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--streams", type=int, default=32, help="beside the deadlines")
    parser.add_argument("--prompt", type=int, default=160, help="tokens of the longest prompt")
    parser.add_argument("--answer", type=int, default=48, help="tokens of the longest answer")
    parser.add_argument("--rounds", type=int, default=20, help="of cancelled prompts")
    parser.add_argument("--step-tokens", type=int, default=256, help="of a chunk")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(
            {"overload": overload, "deadlines": deadlines, "cancelled": cancelled, "streams": streams}[options.part](
                options
            )
        )


if __name__ == "__main__":
    main()
