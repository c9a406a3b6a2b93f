"""The other process of `baton.bench.handoff`: it sends, by every way there is.

Prints where it is reached, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from baton.bench.handoff_shape import BYTES_METHOD, Shape
from baton.handoff import nixl, shm, transport
from baton.handoff.encoding import Message, serialize
from baton.handoff.sender import KvSender
from baton.handoff.transport import TransportFailed
from baton.internal.v1 import prefill_pb2
from baton.rpc.channel import SERVER_OPTIONS
from baton.v1 import inference_pb2


class Peer:
    """A prefill service without an engine: its pool is full, and all of it ready when a call begins."""

    def __init__(self, shape: Shape, memory: memoryview, accepted: prefill_pb2.PrefillAccepted) -> None:
        self._shape = shape
        self._layout = shape.layout()
        self._memory = memory
        self._accepted = accepted

    async def prefill(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """As `Prefill.Prefill`."""
        start = (await anext(requests)).start
        shape = self._shape
        sender = KvSender(self._layout, self._memory, shape.tokens, start.credit_bytes, start.codecs[0])
        accepted = prefill_pb2.PrefillAccepted()
        accepted.CopyFrom(self._accepted)
        accepted.transports[:] = transport.shared(start.transports, self._accepted.transports)
        sender.control(prefill_pb2.PrefillResponse(accepted=accepted))
        if not transport.needs_choice(accepted.transports):
            sender.choose(inference_pb2.TRANSPORT_GRPC)
        for at in range(start.start_token, shape.tokens, shape.step_tokens):
            for layer in range(shape.layers):
                sender.ready(0, layer, at, min(at + shape.step_tokens, shape.tokens))
        sender.control(prefill_pb2.PrefillResponse(first_token=prefill_pb2.FirstToken()))
        sender.finish()

        async def listen() -> None:
            async for request in requests:
                if request.WhichOneof("message") == "credit":
                    sender.credit(request.credit.bytes)
                else:
                    sender.choose(request.choice.transport)
            sender.close()

        listening = asyncio.create_task(listen())
        message: Message
        async for message in sender.messages():
            yield message
        await listening
        digest = sender.digest
        yield prefill_pb2.PrefillResponse(
            done=prefill_pb2.Done(chunks=digest.chunks, bytes=digest.bytes, checksum=digest.value())
        )

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        """As many bytes as the KV has, in messages of a given size, and nothing else: what gRPC itself can do."""
        size = int.from_bytes(request, "little")
        piece = bytes(self._memory[:size])
        for _ in range(self._shape.bytes // size):
            yield piece


async def _send_to_all(door: socket.socket, data: memoryview) -> None:
    """Raw TCP: everything to whoever connects."""
    loop = asyncio.get_running_loop()
    while True:
        connection, _ = await loop.sock_accept(door)
        with connection:
            await loop.sock_sendall(connection, data)


async def _main(shape: Shape, directory: Path) -> None:
    layout = shape.layout()
    fd = os.memfd_create("baton-bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, layout.total_bytes)
    mapped = mmap.mmap(fd, layout.total_bytes)
    memory = memoryview(mapped)
    memory[:] = (os.urandom(1 << 20) * (-(-layout.total_bytes >> 20)))[: layout.total_bytes]
    accepted = prefill_pb2.PrefillAccepted(transports=[inference_pb2.TRANSPORT_GRPC])
    try:
        lender = nixl.Lender(memory)  # lends as long as it lives
        accepted.nixl.CopyFrom(lender.offer())
        accepted.transports.append(inference_pb2.TRANSPORT_NIXL)
    except TransportFailed:
        pass
    server = grpc.aio.server(options=SERVER_OPTIONS)
    async with shm.lending(directory, fd) as offer:
        accepted.shared_memory.CopyFrom(offer)
        accepted.transports.append(inference_pb2.TRANSPORT_SHM)
        peer = Peer(shape, memory, accepted)
        prefill = grpc.stream_stream_rpc_method_handler(
            peer.prefill,
            request_deserializer=prefill_pb2.PrefillRequest.FromString,
            response_serializer=serialize,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("baton.internal.v1.Prefill", {"Prefill": prefill}),
                grpc.method_handlers_generic_handler(
                    BYTES_METHOD.split("/")[1], {"Stream": grpc.unary_stream_rpc_method_handler(peer.stream)}
                ),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        door = socket.create_server(("127.0.0.1", 0))
        door.setblocking(False)
        sending = asyncio.create_task(_send_to_all(door, memory[: shape.bytes]))
        print("ready", port, door.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        sending.cancel()
        await server.stop(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", help="Shape as JSON")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    asyncio.run(_main(Shape.from_json(options.shape), options.directory))
