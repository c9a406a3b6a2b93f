"""Redis servers of every kind, on loopback, with whatever redis-server there is."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis

from baton.cli.redis_server import redis_executable
from tests.cli.conftest import wait_for


def free_port() -> int:
    """A port that is free, and so is the one 10,000 above it, where servers of a cluster talk to each other."""
    while True:
        port = random.randrange(20_000, 50_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def documented_rights(cluster: bool = False, semantic: bool = False) -> list[str]:
    """The rights of an ACL user that docs/cache.md asks for: for one server; for a cluster; for vector sets."""
    page = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    wanted = [r"An ACL user needs `(~.+?)`"]
    wanted += [r"for a cluster,\s+`(.+?)`"] if cluster else []
    wanted += [r"for vector\s+sets, `(.+?)`"] if semantic else []
    rights = []
    for pattern in wanted:
        found = re.search(pattern, page)
        assert found is not None, pattern
        rights += found[1].split()
    return rights


class Server:
    """A redis-server with a configuration of one's own.

    Args:
        directory: of its own.
        lines: of its configuration.
        tls: certificates it serves with; None: no TLS.
    """

    def __init__(self, directory: Path, *lines: str, sentinel: bool = False, tls: Certificates | None = None) -> None:
        directory.mkdir()
        self.port = free_port()
        self._directory = directory
        self._sentinel = sentinel
        self._tls = tls
        listening = [f"port {self.port}"]
        if tls is not None:
            listening = ["port 0", f"tls-port {self.port}", *tls.server_lines()]
        own = ["bind 127.0.0.1", f"dir {directory}", *listening]
        if not sentinel:
            own += ['save ""', "appendonly no"]
        (directory / "conf").write_text("\n".join([*own, *lines]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [redis_executable(), str(self._directory / "conf"), *(["--sentinel"] if self._sentinel else [])]
        with (self._directory / "log").open("ab") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
        wait_for(self._answers, 20)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def client(self, **options: Any) -> redis.Redis:
        """A client that sees what is there."""
        if self._tls is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(self._tls.ca)}
        return redis.Redis("127.0.0.1", self.port, **options)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Servers, for the length of the block."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.kill()


_CLUSTER = (
    "cluster-enabled yes",
    "cluster-config-file nodes",
    "cluster-node-timeout 1000",
    "cluster-require-full-coverage no",  # a cache wants what is left
)


def a_cluster(directory: Path) -> list[Server]:
    """Three masters; `joined` makes them one cluster."""
    return [Server(directory / f"node{i}", *_CLUSTER) for i in range(3)]


def join(servers: list[Server]) -> None:
    """Make running servers one cluster, each with a third of the slots."""
    clients = [server.client() for server in servers]
    for i, client in enumerate(clients):
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384 * i // 3, 16384 * (i + 1) // 3))
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
    for server in servers[1:]:
        clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
    wait_for(lambda: all(b"cluster_state:ok" in _info(client) for client in clients), 30)
    for client in clients:
        client.close()


def _info(client: redis.Redis) -> bytes:
    # A client's own parser for this answer differs from version to version.
    client.set_response_callback("CLUSTER", lambda answer, **_: answer)
    answer = client.execute_command("CLUSTER", "INFO")
    return answer if isinstance(answer, bytes) else str(answer).encode()


@dataclass(frozen=True)
class Certificates:
    """A certificate authority, and a certificate for 127.0.0.1 that it signed."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        """Made with the openssl that is there."""
        directory.mkdir()
        ca, cert, key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
        extensions = directory / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1\n")
        new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        _openssl(*new, "-x509", "-days", "2", "-keyout", f"{ca}.key", "-out", str(ca), "-subj", "/CN=test CA")
        _openssl(*new, "-keyout", str(key), "-out", f"{cert}.csr", "-subj", "/CN=redis")
        signing = ["x509", "-req", "-days", "2", "-CA", str(ca), "-CAkey", f"{ca}.key", "-CAcreateserial"]
        _openssl(*signing, "-in", f"{cert}.csr", "-extfile", str(extensions), "-out", str(cert))
        return cls(ca, cert, key)

    def server_lines(self) -> list[str]:
        """What a server's configuration says of them."""
        return [f"tls-cert-file {self.cert}", f"tls-key-file {self.key}", f"tls-ca-cert-file {self.ca}"]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@cache
def version() -> tuple[int, ...]:
    """Of the redis-server there is."""
    said = subprocess.run([redis_executable(), "--version"], check=True, capture_output=True, text=True, timeout=30)
    return tuple(int(part) for part in said.stdout.split("v=")[1].split()[0].split("."))


@cache
def speaks_tls() -> bool:
    """Whether the redis-server there is was built with TLS, and there is an openssl to make certificates."""
    if shutil.which("openssl") is None:
        return False
    # Without TLS the directive is not known, with TLS it is the certificate that is missing. Redis ends either way.
    said = subprocess.run(
        [redis_executable(), "--port", "0", "--tls-port", "1"], capture_output=True, text=True, timeout=30
    )
    return "Bad directive" not in said.stdout + said.stderr


FREEZE, THAW = signal.SIGSTOP, signal.SIGCONT
