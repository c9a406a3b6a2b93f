"""`baton up`'s end of the guard: a process that ends the mesh if this one is killed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from baton.cli import guard


class Guard:
    """A running guard. Not for several threads.

    Args:
        grace: seconds the services get between SIGTERM and SIGKILL if this process is killed.
        directory: removed when this process ends, however it ends.
    """

    def __init__(self, grace: float, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, f"{grace:g}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            bufsize=1,
        )
        self._tell(f"directory {directory}")

    def watch(self, pid: int) -> None:
        """End this process, which leads its group, if this one dies."""
        self._tell(f"watch {pid}")

    def forget(self, pid: int) -> None:
        """It has ended."""
        self._tell(f"forget {pid}")

    def close(self) -> None:
        """Let the guard end: what it still watches is ended first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody killed the guard: the mesh works without it
            self._process.stdin.write(line + "\n")
