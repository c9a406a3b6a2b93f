"""The embedded Redis: private, in memory, and gone without a trace however it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from baton.cli import redis_server
from baton.cli.redis_server import EmbeddedRedis, RedisFailed
from tests.cli.conftest import wait_for


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    path = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


@pytest.fixture
def server(directory: Path) -> Iterator[EmbeddedRedis]:
    one = EmbeddedRedis()
    one.start()
    yield one
    one.close()


def gone(pid: int) -> bool:
    """Whether no such process runs."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_serves_in_memory_and_evicts(server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        assert client.set("a", b"1")
        assert client.get("a") == b"1"
        said = client.config_get("*")
    assert (said["save"], said["appendonly"], said["port"]) == ("", "no", "0")
    assert (said["maxmemory"], said["maxmemory-policy"]) == (str(64 << 20), "allkeys-lru")


def test_only_this_user_may_open_it(server: EmbeddedRedis, directory: Path) -> None:
    (path,) = directory.iterdir()
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not psutil.Process(server.pid).net_connections("inet")


def test_close_leaves_no_process_no_file_no_thread(directory: Path) -> None:
    before = threading.active_count()
    server = EmbeddedRedis()
    server.start()
    pid = server.pid
    server.close()
    server.close()
    assert gone(pid)
    assert list(directory.iterdir()) == []
    assert threading.active_count() == before


def test_close_ends_a_frozen_one(server: EmbeddedRedis, directory: Path) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.close()
    assert gone(pid)
    assert list(directory.iterdir()) == []


def test_it_starts_again_at_the_same_address(server: EmbeddedRedis) -> None:
    url, first = server.url, server.pid
    os.kill(first, signal.SIGKILL)
    server.start()
    assert server.url == url
    assert server.pid != first
    with redis.Redis.from_url(url) as client:
        assert client.ping()


def test_it_outlives_the_thread_that_started_it(directory: Path) -> None:
    server = EmbeddedRedis()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
    finally:
        server.close()


PARENT = """
import time
from baton.cli.redis_server import EmbeddedRedis
server = EmbeddedRedis()
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the guard of `baton up` does it")
def test_a_killed_parent_takes_it_along(directory: Path) -> None:
    environment = os.environ | {"TMPDIR": str(directory)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert len(list(directory.iterdir())) == 1
        parent.kill()
    wait_for(lambda: gone(pid), 5)
    assert list(directory.iterdir()) == []


def test_an_end_at_start_says_why(directory: Path) -> None:
    server = EmbeddedRedis(maxmemory="a lot")
    with pytest.raises(RedisFailed, match=r"ended with code 1(.|\n)*maxmemory"):
        server.start()
    assert list(directory.iterdir()) == []


def test_without_any_redis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: None)
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RedisFailed, match=r'pip install "baton-mesh\[redis-server\]"'):
        EmbeddedRedis().start()


def test_a_long_temporary_directory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("deep" * 40)))
    server = EmbeddedRedis()
    server.start()
    server.close()
