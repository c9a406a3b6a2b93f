"""A channel whose calls carry metadata that their callers need not know of: credentials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Added = Callable[[], tuple[tuple[str, str], ...]]


class MetadataChannel(grpc.aio.Channel):
    """As another channel, with more metadata on every call.

    Not an interceptor: those handle every message of a stream once more. Not call credentials: they need TLS.

    Args:
        channel: the other one.
        added: asked for each call.
    """

    def __init__(self, channel: grpc.aio.Channel, added: Added) -> None:
        self._channel = channel
        self._added = added

    def _adding(self, start: Callable[..., Any]) -> Any:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return start(*args, metadata=(*(metadata or ()), *self._added()), **kwargs)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """As the other channel's."""
        return self._adding(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """As the other channel's."""
        return self._adding(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """As the other channel's."""
        return self._adding(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """As the other channel's."""
        return self._adding(self._channel.stream_stream(*args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        """As the other channel's."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """As the other channel's."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """As the other channel's."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """As the other channel's."""
        await self._channel.channel_ready()

    async def __aenter__(self) -> grpc.aio.Channel:
        return self

    async def __aexit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        await self._channel.close(None)
