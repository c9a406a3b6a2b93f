"""Which cores a service may use. Linux' own notation: 0-3,8."""

from __future__ import annotations

import os
from pathlib import Path

_THREADS = Path("/proc/self/task")


class BadCpus(ValueError):
    """Not a list of this machine's cores."""


def parse_cpus(text: str) -> frozenset[int]:
    """The cores that a text such as 0-3,8 names; none for an empty one.

    Raises:
        BadCpus: it is no such text.
    """
    cores: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise BadCpus(f"{text!r} names no cores: write them as 0-3,8")
        cores.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(cores)


def pin(cores: frozenset[int]) -> None:
    """Let this process, all its threads and whatever it starts from now on run on these cores only.

    Raises:
        BadCpus: this process may not use one of them.
    """
    if missing := cores - os.sched_getaffinity(0):
        raise BadCpus(f"core {min(missing)} is not to be had; there are {sorted(os.sched_getaffinity(0))}")
    for thread in _THREADS.iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue  # it ended meanwhile
