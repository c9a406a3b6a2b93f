"""Ends a mesh whose `baton up` was killed. A process of its own that imports nothing but the standard library.

It reads standard input, whose other end only `baton up` holds: `watch PID`, `forget PID` and `directory PATH`, a line
each. End of file means that `baton up` is gone, however it went. Then every process still watched gets SIGTERM, after a
bounded wait its whole process group SIGKILL, and the directory is removed. A parent-death signal would need no process,
but it is Linux only, is lost by grandchildren, and gives no second chance to a child that does not end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable


def main(lines: Iterable[str], grace: float) -> None:
    """Guard until the lines end.

    Args:
        lines: commands of `baton up`.
        grace: seconds the processes get between SIGTERM and SIGKILL.
    """
    watched: list[int] = []
    directories: list[str] = []
    for line in lines:
        verb, _, argument = line.rstrip("\n").partition(" ")
        if verb == "watch":
            watched.append(int(argument))
        elif verb == "forget" and int(argument) in watched:
            watched.remove(int(argument))
        elif verb == "directory":
            directories.append(argument)
    for pid in watched:
        _send(os.kill, pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(_send(os.kill, pid, 0) for pid in watched):
        time.sleep(0.05)
    for pid in watched:
        # The group, so that what a service started goes with it. A process that leads none goes alone.
        if not _send(os.killpg, pid, signal.SIGKILL):
            _send(os.kill, pid, signal.SIGKILL)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _send(kill: Callable[[int, int], None], pid: int, signum: int) -> bool:
    try:
        kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    main(sys.stdin, float(sys.argv[1]))
