"""The guard ends what it watches when its input ends, and only that."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cli import guard

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


@pytest.fixture(params=[True, False], ids=["leads a group", "leads none"])
def deaf(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that ignores SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True, start_new_session=request.param
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield process
    process.kill()
    process.communicate(timeout=10)


def test_who_ignores_sigterm_is_killed_after_the_grace(deaf: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    guard.main([f"watch {deaf.pid}\n", f"directory {tmp_path / 'run'}\n"], grace=0.2)
    assert deaf.wait(5) == -signal.SIGKILL
    assert not (tmp_path / "run").exists()


def test_who_was_forgotten_lives(deaf: subprocess.Popen[str]) -> None:
    guard.main([f"watch {deaf.pid}\n", f"forget {deaf.pid}\n"], grace=0.2)
    assert deaf.poll() is None
