"""`baton` as its users run it: a process, with fake services behind it."""

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

import psutil
import pytest

FAKES = Path(__file__).parent / "fakes"


class Up:
    """A running `baton up`."""

    def __init__(self, directory: Path, *flags: str, **environment: str) -> None:
        self.ready_file = directory / "ready.json"
        self.model = directory / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.runtime = directory / "runtime"
        self.runtime.mkdir(mode=0o700)
        self.environment = os.environ | environment
        self.environment |= {"PYTHONPATH": str(FAKES), "XDG_RUNTIME_DIR": str(self.runtime), "TMPDIR": str(directory)}
        fixed = ["--model", str(self.model), "--ready-file", str(self.ready_file), "--redis-url", "redis://127.0.0.1:1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "baton.cli", "up", "--listen", "127.0.0.1:0", *fixed, *flags],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._family: dict[int, psutil.Process] = {}

    def ready(self) -> dict[str, Any]:
        """Wait until it serves; its ready file."""
        wait_for(self.ready_file.exists, 30)
        self.family()
        ready: dict[str, Any] = json.loads(self.ready_file.read_text())
        return ready

    def pid(self, name: str) -> int:
        """Process id of a service."""
        (pid,) = [service["pid"] for service in self.ready()["services"] if service["name"] == name]
        return int(pid)

    def family(self) -> list[psutil.Process]:
        """Every process it ever had below it, this one included, as far as seen."""
        for process in [self.process.pid, *self._family]:
            try:
                parent = psutil.Process(process)
                for child in [parent, *parent.children(recursive=True)]:
                    self._family.setdefault(child.pid, child)
            except psutil.NoSuchProcess:
                continue
        return list(self._family.values())

    def wait(self) -> tuple[int, str, str]:
        """Wait until it ends: exit code, output, errors."""
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run another `baton` command of the same user."""
        return subprocess.run(
            [sys.executable, "-m", "baton.cli", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )

    def survivors(self) -> list[psutil.Process]:
        """Those of the family that still run."""
        return [process for process in self._family.values() if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until the condition holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def baton_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts `baton up`; whatever is left of it at the end of the test is killed."""
    started: list[Up] = []

    def start(*flags: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *flags, **environment))
        return started[-1]

    yield start
    for up in started:
        for process in up.family():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        up.process.communicate(timeout=10)
