"""Measurements that would disturb each other take turns by a lock file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def taking_turns(lock: Path | None) -> Iterator[None]:
    """Nobody else who names this file measures during the block. None: whoever wants does."""
    if lock is None:
        yield
        return
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
