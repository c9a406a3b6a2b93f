"""Who used the processors while something was measured: we, or others? Linux; standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(slots=True)
class Use:
    """Cores in use on average, known once the block is left."""

    own: float = 0.0
    """By this process and all it started."""
    others: float = 0.0
    """By everybody else, other guests of the same host included as far as the kernel knows."""


@contextmanager
def watched() -> Iterator[Use]:
    """Count processor time inside the block."""
    use = Use()
    all_before, busy_before = _machine()
    own_before = _own()
    yield use
    all_after, busy_after = _machine()
    own_after = _own()
    spent = max(1, all_after - all_before) / (os.cpu_count() or 1)
    own = own_after - own_before
    use.own = own / spent
    use.others = max(0.0, busy_after - busy_before - own) / spent


def _machine() -> tuple[int, int]:
    """(all, busy) ticks of all cores since the machine started."""
    with (_PROC / "stat").open(encoding="ascii") as file:
        user, nice, system, idle, waiting, *rest = (int(field) for field in file.readline().split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy + idle + waiting, busy


def _own() -> int:
    """Ticks used by this process and its descendants, those that ended and were waited for included."""
    used: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # The name, in brackets, may hold anything: what counts comes after its end.
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is nobody's business
        pid = int(entry.name)
        used[pid] = sum(int(field) for field in fields[11:15])  # its own, and of its children that ended
        children.setdefault(int(fields[1]), []).append(pid)
    mine, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        mine += used.get(pid, 0)
        waiting += children.get(pid, ())
    return mine
