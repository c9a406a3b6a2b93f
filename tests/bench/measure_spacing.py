"""What sharing messages saves: processor time per token of decode's front and of who reads it, without an engine.

    python -m tests.bench.measure_spacing --streams 8

A front of its own process gets a token for each of its streams every 20 ms, as from an engine, and streams them over
gRPC as decode does (`baton_decode.run.Run.stream`); this process reads. Three paces: a message for each token; what two
cores allow by default; and next to none, which leaves what tokens cost that are in no message of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.engine.handle import RequestHandle
from baton.engine.messages import FinishReason, Output
from baton.internal.v1 import decode_pb2
from baton.rpc.channel import MESH_CHANNEL_OPTIONS, SERVER_OPTIONS
from baton.worker.trials import Trials
from baton_decode import run as decode_run
from baton_decode.spacing import Spacing, affordable_rate
from tests.decode.test_streaming import TOKENIZERS, WORDS, Engine, a_request

TOKENS, STEP_SECONDS, STAGGER_SECONDS = 400, 0.02, 0.013
RARELY = 0.5


class Rare(Spacing):
    """Half a second between two messages of a stream."""

    def seconds(self) -> float:
        return RARELY


PACES = {
    "every token": lambda: Spacing(1e9),
    "two cores' default": lambda: Spacing(affordable_rate(2)),
    "rarely": lambda: Rare(1.0),
}


async def serve(pace: str) -> None:
    """The front: prints its port, ends with its standard input."""
    decode_run.LONGEST = 2 * RARELY  # type: ignore[misc]
    spacing = PACES[pace]()
    made: dict[RequestHandle, int] = {}

    async def step() -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            for handle, count in list(made.items()):
                last = FinishReason.LENGTH if count + 1 == TOKENS else None
                token_id = WORDS[count % len(WORDS)]
                handle.push(
                    Output(
                        request_id="r",
                        index=count,
                        token_ids=[token_id],
                        finish_reason=last,
                        compute_ns=count * 1_000_000,
                    )
                )
                made[handle] = count + 1
                if last is not None:
                    del made[handle]

    async def generate(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        handle = RequestHandle(Engine(), "r")
        made[handle] = 0
        async for message in decode_run.Run(TOKENIZERS[0], a_request(TOKENIZERS[0])).stream(
            handle, spacing, Trials(10.0)
        ):
            yield message

    async def spent(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return str(time.process_time()).encode()

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate, None, decode_pb2.GenerateResponse.SerializeToString),
        "Spent": grpc.unary_unary_rpc_method_handler(spent),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.bench.Front", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    stepping = asyncio.create_task(step())
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait([stepping, reading], return_when=asyncio.FIRST_COMPLETED)
    await server.stop(0)
    if stepping.done():
        stepping.result()  # it never ends but by an error
    stepping.cancel()


async def measure(pace: str, streams: int) -> str:
    """A row of the table."""
    front = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.measure_spacing", "--serve", pace),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert front.stdin is not None
    assert front.stdout is not None
    port = int(await front.stdout.readline())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=MESH_CHANNEL_OPTIONS) as channel:
        generate = channel.unary_stream("/baton.bench.Front/Generate", None, decode_pb2.GenerateResponse.FromString)
        spent = channel.unary_unary("/baton.bench.Front/Spent")

        async def read(number: int) -> int:
            await asyncio.sleep(number * STAGGER_SECONDS)  # streams do not begin together
            return len([message async for message in generate(b"")])

        fronts, own = float(await spent(b"")), time.process_time()
        messages = sum(await asyncio.gather(*map(read, range(streams))))
        fronts, own = float(await spent(b"")) - fronts, time.process_time() - own
    front.stdin.close()
    await front.wait()
    tokens = streams * TOKENS
    return f"| {pace} | {tokens / messages:.1f} | {fronts / tokens * 1e6:.0f} | {own / tokens * 1e6:.0f} |"


async def main(streams: int, rounds: int) -> None:
    """The table."""
    print(f"{streams} streams, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| messages | tokens in one | front, µs a token | reader, µs a token |\n|---|---:|---:|---:|")
    for _ in range(rounds):
        for pace in PACES:
            print(await measure(pace, streams), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--serve", choices=list(PACES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(serve(options.serve) if options.serve else main(options.streams, options.rounds))
