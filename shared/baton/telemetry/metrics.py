"""Prometheus endpoint of a service. Metrics are module-level objects next to the code that moves them."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server


@dataclass(frozen=True, slots=True)
class Exporter:
    """A running metrics endpoint."""

    address: str
    server: WSGIServer
    thread: Thread

    def close(self) -> None:
        """Stop serving and free the port."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=2)


def serve(listen: str) -> Exporter | None:
    """Serve /metrics on "host:port" (port 0: a free one). Empty: no endpoint."""
    if not listen:
        return None
    host, _, port = listen.rpartition(":")
    server, thread = start_http_server(int(port), addr=host or "127.0.0.1")
    return Exporter(f"{host}:{server.server_port}", server, thread)
