"""Channel and server options, measured: what finds a dead, frozen or cut-off peer in about two seconds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc

from baton.rpc.dialer import Dialer

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_STATUS_SECONDS: Final = 0.1

MESH_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    # A frozen peer is noticed in 60 s without this one, whatever keepalive says.
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

MAX_METADATA_BYTES: Final = 16 * 1024
"""Metadata of one call. More is refused before anything sees it."""

SERVER_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # By default whoever connects and says nothing keeps a descriptor for two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # gRPC's own limit is soft: above the first it refuses some calls at random, above the second all.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Peers of the mesh ping every second: without these two the server cuts them off after three.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
"""All servers'; those of services have `server_options`."""


def server_options(silence: float) -> list[tuple[str, int | str]]:
    """Options of a server whose callers are gone, and their calls with them, when they are silent for so long.

    Args:
        silence: seconds; half of it passes before they are pinged, half is theirs to answer.
    """
    half_ms = int(silence * 500)
    return [
        *SERVER_OPTIONS,
        ("grpc.keepalive_time_ms", half_ms),
        ("grpc.keepalive_timeout_ms", half_ms),
        ("grpc.http2.ping_timeout_ms", half_ms),  # as above: without it a frozen caller holds its calls for a minute
    ]


PLAIN: Final = Dialer()
"""Without TLS, and without a token."""


def mesh_channel(target: str, dialer: Dialer = PLAIN) -> grpc.aio.Channel:
    """A channel to another service of the mesh.

    Args:
        target: gRPC name, for example "127.0.0.1:4000" or "dns:///decode:4000".
        dialer: knows of certificates and tokens.
    """
    return dialer.dial(target, MESH_CHANNEL_OPTIONS)


class ChannelPool:
    """One channel per target, shared by all calls, kept while in use and a while after.

    Args:
        limit: channels kept beyond those in use; the longest unused one is closed first.
        dialer: opens them. Once it has other certificates, calls get a new channel; those that run keep theirs.
    """

    def __init__(self, limit: int = 64, dialer: Dialer = PLAIN) -> None:
        self._limit = limit
        self._dialer = dialer
        self._channels: OrderedDict[str, _Shared] = OrderedDict()
        self._replaced: set[_Shared] = set()

    @asynccontextmanager
    async def channel(self, target: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to a target, held open at least as long as the block."""
        shared = self._channels.get(target)
        version = self._dialer.version
        if shared is not None and shared.version != version:
            self._replaced.add(self._channels.pop(target))
            shared = None
        if shared is None:
            shared = self._channels[target] = _Shared(mesh_channel(target, self._dialer), version)
        self._channels.move_to_end(target)
        shared.users += 1
        try:
            yield shared.channel
        finally:
            shared.users -= 1
            await self._shrink()

    async def close(self) -> None:
        """Close all channels and cancel what runs on them."""
        channels = [*self._channels.values(), *self._replaced]
        self._channels, self._replaced = OrderedDict(), set()
        for shared in channels:
            await shared.channel.close(None)

    async def _shrink(self) -> None:
        for shared in [shared for shared in self._replaced if not shared.users]:
            self._replaced.discard(shared)
            await shared.channel.close(None)
        idle = [target for target, shared in self._channels.items() if not shared.users]
        for target in idle[: max(0, len(idle) - self._limit)]:
            now = self._channels.get(target)
            if now is not None and not now.users:  # closing the ones before took a moment
                del self._channels[target]
                await now.channel.close(None)


@dataclass(eq=False, slots=True)
class _Shared:
    channel: grpc.aio.Channel
    version: int
    users: int = 0


async def read_status(messages: AsyncIterator[Any]) -> None:
    """After the last message that counts, read on to the call's status, which is right behind.

    A call that is left before its status is a cancelled one, for both sides. One whose status does not come is left.
    """
    with suppress(TimeoutError, grpc.aio.AioRpcError):
        async with asyncio.timeout(_STATUS_SECONDS):
            async for _ in messages:
                pass
