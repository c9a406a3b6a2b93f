"""What the loopback carries: bare TCP, and a bare gRPC stream of bytes. The sender is a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import Any, Final

import grpc

MESSAGE: Final = 512 * 1024
"""Bytes a message: in the middle of what gRPC likes best."""
_METHOD: Final = "/baton.bench.Wire/Bytes"
_OPTIONS: Final = [("grpc.max_receive_message_length", 2 * MESSAGE), ("grpc.max_send_message_length", 2 * MESSAGE)]


def tcp(total: int) -> float:
    """Bytes per second of `total` bytes from another process over a TCP socket."""
    with _sender("tcp", total) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = memoryview(bytearray(MESSAGE))
        received = connection.recv_into(buffer)  # the first bytes: the sender is up and sending
        began, counted = time.perf_counter(), 0
        while received:
            received = connection.recv_into(buffer)
            counted += received
        return counted / (time.perf_counter() - began)


def grpc_stream(total: int) -> float:
    """Bytes per second of `total` bytes from another process over a gRPC stream, in messages of plain bytes."""
    with _sender("grpc", total) as port:
        return asyncio.run(_receive(port))


async def _receive(port: int) -> float:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS) as channel:
        call = channel.unary_stream(_METHOD, None, None)(b"")
        counted, began = 0, 0.0
        async for message in call:
            if began:
                counted += len(message)
            else:
                began = time.perf_counter()
        return counted / (time.perf_counter() - began)


@contextmanager
def _sender(kind: str, total: int) -> Iterator[int]:
    """The sender's process; gives its port."""
    command = [sys.executable, "-m", "baton.bench.wire", kind, str(total)]
    with Popen(command, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _send_tcp(total: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        message = bytes(MESSAGE)
        with connection:
            for _ in range(-(-total // MESSAGE)):
                connection.sendall(message)


async def _send_grpc(total: int) -> None:
    message = bytes(MESSAGE)

    async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        for _ in range(-(-total // MESSAGE)):
            yield message

    handler = grpc.unary_stream_rpc_method_handler(answer)  # bytes as they are
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.bench.Wire", {"Bytes": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    """The sending side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["tcp", "grpc"])
    parser.add_argument("total", type=int)
    arguments = parser.parse_args()
    if arguments.kind == "tcp":
        _send_tcp(arguments.total)
    else:
        asyncio.run(_send_grpc(arguments.total))


if __name__ == "__main__":
    main()
