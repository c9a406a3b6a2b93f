"""The cache as a process: it serves, whatever Redis does; it ends when told to; it does not tell what it knows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from tests.cache.conftest import an_answer, cache_key
from tests.cli.conftest import wait_for

SERVICE = "baton.internal.v1.ResponseCache"


class Process:
    """A running `python -m baton_cache`."""

    def __init__(self, directory: Path, *flags: str, **environment: str) -> None:
        self._ready_file = directory / "ready.json"
        self._log = directory / "log"
        with self._log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "baton_cache", "--ready-file", str(self._ready_file), *flags],
                stdout=sink,
                stderr=sink,
                env=os.environ | environment,
            )

    def ready(self) -> dict[str, Any]:
        """Wait until it serves; its ready file."""
        wait_for(lambda: self._ready_file.exists() or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.log()
        ready: dict[str, Any] = json.loads(self._ready_file.read_text())
        return ready

    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text()

    def stop(self) -> tuple[int, float]:
        """SIGTERM; exit code, and seconds it took."""
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(20), time.monotonic() - began


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(*flags: str, **environment: str) -> Process:
        started.append(Process(tmp_path, *flags, **environment))
        return started[-1]

    yield one
    for process in started:
        process.process.kill()
        process.process.wait()


def healthy(address: str, service: str = "") -> bool:
    with grpc.insecure_channel(address) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=5, wait_for_ready=True
        )
    return response.status == health_pb2.HealthCheckResponse.SERVING


def fill_and_look_up(address: str) -> response_cache_pb2.LookupResponse:
    with grpc.insecure_channel(address) as channel:
        stub = response_cache_pb2_grpc.ResponseCacheStub(channel)
        key = cache_key(stop=["the stop text"])
        stub.Fill(response_cache_pb2.FillRequest(key=key, answer=an_answer("the answer's text")), timeout=5)
        return stub.Lookup(response_cache_pb2.LookupRequest(key=key), timeout=5)


def test_it_serves_and_ends(start: Callable[..., Process], redis_server: EmbeddedRedis) -> None:
    process = start("--redis-url", redis_server.url, "--redis-timeout", "1")
    ready = process.ready()
    assert ready["service"] == "cache"
    assert healthy(ready["grpc"])
    assert healthy(ready["grpc"], SERVICE)
    assert fill_and_look_up(ready["grpc"]).hit
    code, seconds = process.stop()
    assert (code, seconds < 5) == (0, True), process.log()


def test_it_serves_without_redis(start: Callable[..., Process]) -> None:
    process = start("--redis-url", "redis://127.0.0.1:1")
    address = process.ready()["grpc"]
    assert healthy(address, SERVICE)
    assert fill_and_look_up(address).miss_reason == response_cache_pb2.MISS_REASON_STORE_FAILED
    assert healthy(address, SERVICE)
    assert process.stop()[0] == 0
    assert "Redis does not answer" in process.log()


def test_it_ends_while_redis_is_frozen(start: Callable[..., Process], redis_server: EmbeddedRedis) -> None:
    process = start("--redis-url", redis_server.url)
    process.ready()
    os.kill(redis_server.pid, signal.SIGSTOP)
    code, seconds = process.stop()
    assert (code, seconds < 5) == (0, True), process.log()


@pytest.mark.parametrize("wanted", [True, False], ids=["taken", "refused"])
def test_no_text_and_no_password_is_logged(
    start: Callable[..., Process], redis_server: EmbeddedRedis, wanted: bool
) -> None:
    import redis

    if wanted:
        with redis.Redis.from_url(redis_server.url) as client:
            client.config_set("requirepass", "sesame")
    url = redis_server.url.replace("unix://", "unix://:sesame@")
    process = start("--log-level", "DEBUG", "--redis-timeout", "1", BATON_REDIS_URL=url)
    assert fill_and_look_up(process.ready()["grpc"]).hit == wanted
    assert process.stop()[0] == 0
    log = process.log()
    assert "serving" in log
    for secret in ("sesame", "the stop text", "the answer"):
        assert secret not in log


def test_a_wrong_url_is_refused_without_repeating_it(start: Callable[..., Process]) -> None:
    process = start("--redis-url", "http://:sesame@somewhere")
    assert process.process.wait(20) != 0
    assert "--redis-url" in process.log()
    assert "sesame" not in process.log()


def test_it_needs_no_torch() -> None:
    code = "import sys, baton_cache.app; sys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
