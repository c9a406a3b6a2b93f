"""Channels of clients: find a dead or cut-off router in about 15 seconds, and say who calls."""

from __future__ import annotations

from typing import Final

from baton import __version__
from baton.rpc.channel import MAX_MESSAGE_BYTES

DEFAULT_TIMEOUT: Final = 300.0
"""Deadline of a request that sets none, seconds."""

CLIENT_CHANNEL_OPTIONS: Final[list[tuple[str, int | str]]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.primary_user_agent", f"baton-python/{__version__}"),
]
