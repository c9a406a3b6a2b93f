"""Channels of clients: what finds a dead, frozen or cut-off router, and says who calls."""

from __future__ import annotations

from typing import Final

from baton import __version__
from baton.rpc.channel import MAX_MESSAGE_BYTES

DEFAULT_TIMEOUT: Final = 300.0
"""Deadline of a request that sets none, seconds."""


def channel_options(routers: int) -> list[tuple[str, int | str]]:
    """Options of a client's channels.

    Args:
        routers: how many it has. To find out soon that the only one is gone helps nobody, and proxies on the way may
            not like to be pinged: 15 s. With others to go on with: 2 s.
    """
    time_ms, timeout_ms = (10_000, 5_000) if routers == 1 else (1_000, 1_000)
    return [
        ("grpc.keepalive_time_ms", time_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.primary_user_agent", f"baton-python/{__version__}"),
    ]


CLIENT_CHANNEL_OPTIONS: Final = channel_options(1)
"""Of a client with one router."""
