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
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from baton.bench.handoff_shape import BYTES_METHOD, EMPTY_METHOD, LATE, LATE_SECONDS, Shape
from baton.handoff import nixl, shm, transport
from baton.handoff.encoding import serialize
from baton.handoff.leases import LeaseTable
from baton.handoff.sender import KvSender
from baton.handoff.transport import TransportFailed
from baton.internal.v1 import prefill_pb2
from baton.rpc.channel import SERVER_OPTIONS
from baton.v1 import inference_pb2


class Peer:
    """A prefill service without an engine: its pool is full, and all of it ready when a call begins."""

    def __init__(
        self, shape: Shape, memory: memoryview, accepted: prefill_pb2.PrefillAccepted, leases: LeaseTable
    ) -> None:
        self._shape = shape
        self._layout = shape.layout()
        self._memory = memory
        self._accepted = accepted
        self._leases = leases

    async def prefill(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """As `Prefill.Prefill`."""
        start = (await anext(requests)).start
        sender = KvSender(self._layout, self._memory, self._shape.tokens, start.credit_bytes, start.codecs[0])
        accepted = prefill_pb2.PrefillAccepted()
        accepted.CopyFrom(self._accepted)
        accepted.transports[:] = transport.shared(start.transports, self._accepted.transports)
        if start.mapped_memory == accepted.shared_memory.name:
            accepted.chosen = inference_pb2.TRANSPORT_SHM
            sender.choose(accepted.chosen)
        if not transport.needs_choice(accepted.transports):
            sender.choose(inference_pb2.TRANSPORT_GRPC)
        with self._leases.hold() as lease:
            accepted.lease.MergeFrom(lease or prefill_pb2.Lease())
            sender.control(prefill_pb2.PrefillResponse(accepted=accepted))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._feed(start, sender))
                group.create_task(_listen(requests, sender))
                async for message in sender.messages():
                    yield message
        yield prefill_pb2.PrefillResponse(done=sender.done())

    async def _feed(self, start: prefill_pb2.Start, sender: KvSender) -> None:
        """All KV, at once or after a while, and the first token."""
        if start.request_id == LATE:
            await asyncio.sleep(LATE_SECONDS)
        # Of the clock that all processes of this host share.
        first = prefill_pb2.FirstToken(since_accepted_ns=time.monotonic_ns())
        shape = self._shape
        for at in range(start.start_token, shape.tokens, shape.step_tokens):
            for layer in range(shape.layers):
                sender.ready(0, layer, at, min(at + shape.step_tokens, shape.tokens))
        sender.control(prefill_pb2.PrefillResponse(first_token=first))
        sender.finish()

    async def empty(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """A message for the first of the caller's, and one when it has closed: what such a call itself takes."""
        yield await anext(requests)
        async for _ in requests:
            pass
        yield b""

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        """As many bytes as the KV has, in messages of a given size, and nothing else: what gRPC itself can do."""
        size = int.from_bytes(request, "little")
        piece = bytes(self._memory[:size])
        for _ in range(self._shape.bytes // size):
            yield piece


async def _listen(requests: AsyncIterator[Any], sender: KvSender) -> None:
    async for request in requests:
        if request.WhichOneof("message") == "credit":
            sender.credit(request.credit.bytes)
        else:
            sender.choose(request.choice.transport)
    sender.close()


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
    leases = LeaseTable()
    async with shm.lending(directory, fd, leases) as offer:
        accepted.shared_memory.CopyFrom(offer)
        accepted.transports.append(inference_pb2.TRANSPORT_SHM)
        peer = Peer(shape, memory, accepted, leases)
        prefill = grpc.stream_stream_rpc_method_handler(
            peer.prefill,
            request_deserializer=prefill_pb2.PrefillRequest.FromString,
            response_serializer=serialize,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("baton.internal.v1.Prefill", {"Prefill": prefill}),
                grpc.method_handlers_generic_handler(
                    BYTES_METHOD.split("/")[1],
                    {
                        BYTES_METHOD.split("/")[2]: grpc.unary_stream_rpc_method_handler(peer.stream),
                        EMPTY_METHOD.split("/")[2]: grpc.stream_stream_rpc_method_handler(peer.empty),
                    },
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
