"""Channel and server options, measured: what finds a dead, frozen or cut-off peer in about two seconds."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

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

SERVER_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Peers of the mesh ping every second: without these two the server cuts them off after three.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def mesh_channel(target: str, interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None) -> grpc.aio.Channel:
    """A channel to another service of the mesh.

    Args:
        target: gRPC name, for example "127.0.0.1:4000" or "dns:///decode:4000".
        interceptors: client interceptors; None: those tracing wants.
    """
    from baton.telemetry.tracing import client_interceptors

    chosen = client_interceptors() if interceptors is None else list(interceptors)
    return grpc.aio.insecure_channel(target, options=MESH_CHANNEL_OPTIONS, interceptors=chosen)
