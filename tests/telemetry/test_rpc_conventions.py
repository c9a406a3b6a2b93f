"""A gRPC target as OpenTelemetry's conventions name it; the first cases are their own examples."""

from __future__ import annotations

import pytest

from baton.telemetry.rpc_conventions import server_attributes


@pytest.mark.parametrize(
    ("target", "address", "port"),
    [
        ("grpc.io:50051", "grpc.io", 50051),
        ("dns://1.2.3.4/grpc.io:50051", "grpc.io", 50051),
        ("unix:///run/containerd/containerd.sock", "/run/containerd/containerd.sock", None),
        ("zk://zookeeper:2181/my-server", "zk://zookeeper:2181/my-server", None),
        ("ipv4:198.51.100.123:50051,198.51.100.124:50051", "ipv4:198.51.100.123:50051,198.51.100.124:50051", None),
        ("127.0.0.1:4000", "127.0.0.1", 4000),
        ("dns:///decode:4000", "decode", 4000),
        ("dns:decode:4000", "decode", 4000),
        ("ipv4:198.51.100.123:50051", "198.51.100.123", 50051),
        ("[::1]:4000", "::1", 4000),
        ("ipv6:[2001:db8::1]:4000", "2001:db8::1", 4000),
        ("::1", "::1", None),
        ("decode", "decode", None),
        ("unix:run/decode.sock", "run/decode.sock", None),
    ],
)
def test_server(target: str, address: str, port: int | None) -> None:
    expected = {"server.address": address} | ({} if port is None else {"server.port": port})
    assert server_attributes(target) == expected
