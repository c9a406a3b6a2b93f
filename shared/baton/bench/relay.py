"""What a token costs on its way through a bare gRPC relay: the least a hop written in Python can cost.

A source streams messages, one token each, to a relay, which streams them on. Plain bytes, no work: what is left is gRPC
and asyncio. `python -m baton.bench.relay source` and `... relay --target ADDRESS` are those two.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

_METHOD: Final = "/baton.bench.Relay/Stream"
_MESSAGE: Final = bytes(16)
"""About what a message with one token and its text takes."""


class BareRelay:
    """A running source and relay, as a source of streams.

    Attributes:
        pids: of "source" and "relay".
    """

    def __init__(self, channel: grpc.aio.Channel, pids: dict[str, int]) -> None:
        self._stream = channel.unary_stream(_METHOD, None, None)
        self.pids = pids

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        """So many messages; the prompt is not looked at."""
        async for _ in self._stream(b"%d" % output_tokens):
            yield 1


@asynccontextmanager
async def bare_relay(interval: float) -> AsyncIterator[BareRelay]:
    """Start both processes; they end with the block.

    Args:
        interval: seconds between two tokens of a stream, as an engine's steps would have them.
    """
    source, from_ = await _start("source", "--interval", str(interval))
    try:
        relay, port = await _start("relay", "--target", f"127.0.0.1:{from_}")
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield BareRelay(channel, {"source": source.pid, "relay": relay.pid})
        finally:
            relay.terminate()
            await relay.wait()
    finally:
        source.terminate()
        await source.wait()


async def _start(*arguments: str) -> tuple[asyncio.subprocess.Process, int]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.bench.relay", *arguments), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    return process, int(await process.stdout.readline())


class _Steps:
    """The source's clock: all streams get their tokens in the same instants, as those of one engine do."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    async def run(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            ended, self._next = self._next, asyncio.Event()
            ended.set()

    async def next(self) -> None:
        await self._next.wait()


async def _serve(target: str, interval: float) -> None:
    steps = _Steps()

    async def produce(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        for _ in range(int(request)):
            await steps.next()
            await context.write(_MESSAGE)

    async with grpc.aio.insecure_channel(target or "127.0.0.1:1") as channel, asyncio.TaskGroup() as group:
        upstream = channel.unary_stream(_METHOD, None, None)

        async def relay(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async for message in upstream(request):
                await context.write(message)

        handler = grpc.unary_stream_rpc_method_handler(relay if target else produce)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("baton.bench.Relay", {"Stream": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        group.create_task(steps.run(interval))
        await server.wait_for_termination()


def main() -> None:
    """One of the two processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["source", "relay"])
    parser.add_argument("--target", default="", help="address of the source")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two tokens")
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.target, arguments.interval))


if __name__ == "__main__":
    main()
