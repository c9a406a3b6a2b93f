"""The two spans of a call, by how it ends, as OpenTelemetry's conventions for gRPC want them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.rpc.access import Who
from baton.rpc.errors import DeadlineExceeded, InvalidArgument, Overloaded
from baton.rpc.gate import Gate
from baton.rpc.interceptor import RimInterceptor
from baton.telemetry import tracing
from tests.fixtures.otlp import Span, receiver

SERVER, CLIENT = 2, 3
SERVER_ERRORS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
RAISES: dict[bytes, Exception] = {
    b"overloaded": Overloaded("full"),
    b"invalid": InvalidArgument("field", "is wrong"),
    b"deadline": DeadlineExceeded("the deadline passed"),
    b"defect": ValueError("a defect"),
    b"missing": NotImplementedError(),
}


async def unary(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """End as the request says: with a status, an exception, or never."""
    if request == b"never":
        await asyncio.Event().wait()
    if request in RAISES:
        raise RAISES[request]
    if request != b"OK":
        await context.abort(grpc.StatusCode[request.decode()], "as you wish")
    return b"answer"


async def stream(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    """The same, after a message."""
    yield b"first"
    yield await unary(request, context)


GATE = Gate(anonymous=Who.PEER, declared={"/test.Service/Unary": Who.PEER, "/test.Service/Stream": Who.PEER})


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[grpc.aio.Channel, str]]:
    """A channel to a server with both methods, and its target."""
    server = grpc.aio.server(interceptors=[RimInterceptor(gate=GATE)])
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield channel, target
    finally:
        await server.stop(0)


async def spans_of(method: str, request: bytes, timeout: float | None = None) -> tuple[Span, Span, str]:
    """The client's and the server's span of one call, and the target."""
    async with receiver() as collector:
        tracing.configure("test", collector.address, 1.0)
        try:
            async with serving() as (channel, target):
                path = f"test.Service/{method}"
                start = (channel.unary_unary if method == "Unary" else channel.unary_stream)(f"/{path}")
                call = tracing.call(path, start, request, timeout, target)
                try:
                    if method == "Unary":
                        await call
                    else:
                        assert [message async for message in call] == [b"first", b"answer"]
                except grpc.aio.AioRpcError:
                    assert request != b"OK"
        finally:
            await asyncio.to_thread(tracing.shutdown)
        by_kind = {span.kind: span for span in collector.spans}
        assert len(collector.spans) == 2
    return by_kind[CLIENT], by_kind[SERVER], target


def check_client(span: Span, method: str, target: str, code: str) -> None:
    """All that a client's span must say, and nothing else."""
    host, _, port = target.partition(":")
    expected = {
        "rpc.system.name": "grpc",
        "rpc.method": f"test.Service/{method}",
        "rpc.response.status_code": code,
        "server.address": host,
        "server.port": int(port),
    }
    failed = code != "OK"
    assert span.name == expected["rpc.method"]
    assert span.attributes == expected | ({"error.type": code} if failed else {})
    assert span.error == failed


def check_server(span: Span, method: str, code: str, reason: str = "") -> None:
    """The same of the server's."""
    expected = {
        "rpc.system.name": "grpc",
        "rpc.method": f"test.Service/{method}",
        "rpc.response.status_code": code,
    }
    failed = code in SERVER_ERRORS
    assert span.name == expected["rpc.method"]
    assert span.attributes == (
        expected | ({"error.type": code} if failed else {}) | ({"baton.error.reason": reason} if reason else {})
    )
    assert span.error == failed


@pytest.mark.parametrize("method", ["Unary", "Stream"])
@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode])
async def test_every_status(method: str, code: str) -> None:
    client, server, target = await spans_of(method, code.encode())
    check_client(client, method, target, code)
    check_server(server, method, code)
    assert server.parent_id == client.span_id


@pytest.mark.parametrize("method", ["Unary", "Stream"])
@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (b"overloaded", "RESOURCE_EXHAUSTED", "OVERLOADED"),
        (b"invalid", "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        (b"deadline", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        (b"defect", "INTERNAL", "ValueError"),
        (b"missing", "UNIMPLEMENTED", "UNIMPLEMENTED"),
    ],
)
async def test_every_kind_of_exception(method: str, request_: bytes, code: str, reason: str) -> None:
    client, server, target = await spans_of(method, request_)
    check_client(client, method, target, code)
    check_server(server, method, code, reason)


async def test_a_caller_that_leaves_is_no_error_of_the_server() -> None:
    client, server, target = await spans_of("Unary", b"never", timeout=0.2)
    check_client(client, "Unary", target, "DEADLINE_EXCEEDED")
    check_server(server, "Unary", "CANCELLED")
