"""Server reflection, as tools ask for it today (grpc.reflection.v1) and did before (v1alpha): the same messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

_OLD: Final = "grpc.reflection.v1alpha"
_NEW: Final = "grpc.reflection.v1"
_NAMES: Final = (f"{_NEW}.ServerReflection", f"{_OLD}.ServerReflection")


def add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Have a server tell which services it has, itself included, and what their messages look like.

    Args:
        services: full names, for example "baton.v1.Inference".
        server: not started yet.
    """
    describe()
    reflection = ReflectionServicer([*services, *_NAMES])

    async def tell(
        requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async for answer in reflection.ServerReflectionInfo(requests, context):
            yield answer

    handler = grpc.stream_stream_rpc_method_handler(
        tell,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in _NAMES]
    )


def describe() -> None:
    """Describe v1 as well, which grpcio-reflection does not have: v1alpha's file under another package."""
    pool = descriptor_pool.Default()
    name = "grpc/reflection/v1/reflection.proto"
    try:
        pool.FindFileByName(name)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = name, _NEW
        for message in file.message_type:
            for field in message.field:
                if not field.type_name:
                    continue  # a number or a text
                field.type_name = field.type_name.replace(f".{_OLD}.", f".{_NEW}.")
        for service in file.service:
            for method in service.method:
                method.input_type = method.input_type.replace(f".{_OLD}.", f".{_NEW}.")
                method.output_type = method.output_type.replace(f".{_OLD}.", f".{_NEW}.")
        pool.Add(file)
