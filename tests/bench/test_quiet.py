"""Whose processor time it was."""

from __future__ import annotations

import subprocess
import sys
import time

from baton.bench.quiet import watched

SPIN = "import time\nwhile time.process_time() < 0.6: pass"
TICK = 0.05
"""Seconds: the kernel counts in hundredths, of each process its own."""


def test_our_own_time_and_that_of_children_that_ended_is_ours() -> None:
    began, used = time.monotonic(), time.process_time()
    with watched() as use:
        subprocess.run([sys.executable, "-c", SPIN], check=True)
    elapsed, used = time.monotonic() - began, time.process_time() - used
    assert use.own * elapsed >= 0.6 - TICK
    assert use.own * elapsed <= 0.6 + used + 0.5


def test_what_is_not_ours_is_others() -> None:
    # A daemon: its parent ends at once, so it is no descendant of ours.
    detach = f"import os, sys\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n{SPIN}"
    with watched() as use:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", detach], check=True)
        time.sleep(1.5)
        elapsed = time.monotonic() - began
    assert use.own * elapsed < 0.5
    assert use.others * elapsed > 0.2
