"""Servers with every method of every service there is, made from the descriptors: each answers with who called."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from baton.internal.v1 import (
    cache_admin_pb2,
    decode_pb2,
    observe_pb2,
    prefill_pb2,
    response_cache_pb2,
    worker_pb2,
)
from baton.rpc.caller import current_caller
from baton.rpc.channel import SERVER_OPTIONS
from baton.rpc.gate import Gate
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.reflection import describe
from baton.v1 import inference_pb2

FILES = [
    inference_pb2.DESCRIPTOR,
    cache_admin_pb2.DESCRIPTOR,
    decode_pb2.DESCRIPTOR,
    observe_pb2.DESCRIPTOR,
    prefill_pb2.DESCRIPTOR,
    response_cache_pb2.DESCRIPTOR,
    worker_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
]


def every_method() -> dict[str, MethodDescriptor]:
    """All methods of all services, by full name."""
    describe()
    files = [*FILES, descriptor_pool.Default().FindFileByName("grpc/reflection/v1/reflection.proto")]
    return {
        f"/{service.full_name}/{method.name}": method
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


async def _answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return current_caller().tenant.encode()


async def _stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    yield current_caller().tenant.encode()


def _handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(_stream)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_answer)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_stream)
    return grpc.unary_unary_rpc_method_handler(_answer)


@contextlib.asynccontextmanager
async def serving(
    gate: Gate,
    credentials: grpc.ServerCredentials | None = None,
    more: tuple[str, ...] = (),
    options: list[tuple[str, int | str]] = SERVER_OPTIONS,
) -> AsyncIterator[str]:
    """A server with all of them, and unary ones that are declared nowhere; its port on localhost."""
    server = grpc.aio.server(interceptors=[RimInterceptor(gate=gate)], options=options)
    handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for name, method in every_method().items():
        service, _, short = name[1:].partition("/")
        handlers.setdefault(service, {})[short] = _handler(method)
    for name in more:
        service, _, short = name[1:].partition("/")
        handlers.setdefault(service, {})[short] = grpc.unary_unary_rpc_method_handler(_answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(*item) for item in handlers.items()])
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def call(channel: grpc.aio.Channel, name: str, metadata: tuple[tuple[str, str], ...] = ()) -> str:
    """Call a method; "OK" and the tenant that it saw, or the status code."""
    method = every_method().get(name)
    streams = (method.client_streaming, method.server_streaming) if method else (False, False)

    async def requests() -> AsyncIterator[bytes]:
        yield b""

    start: Callable[..., Any]
    try:
        match streams:
            case (False, False):
                answer = await channel.unary_unary(name)(b"", metadata=metadata, timeout=10)
            case (True, False):
                answer = await channel.stream_unary(name)(requests(), metadata=metadata, timeout=10)
            case (False, True):
                start = channel.unary_stream(name)
                (answer,) = [one async for one in start(b"", metadata=metadata, timeout=10)]
            case _:
                start = channel.stream_stream(name)
                (answer,) = [one async for one in start(requests(), metadata=metadata, timeout=10)]
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return f"OK {answer.decode()}".strip()
