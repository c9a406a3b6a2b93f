"""Runs first in every process of a faulty mesh: on SIGUSR2 the process's main thread does nothing for a while.

An event loop that is held inside a live process: its sockets stay open, the kernel answers for TCP, and nothing else
happens. Nothing of this is in the services themselves. `BATON_FAULTS_HANG_FILE` names the file with the seconds.
"""

import os
import runpy
import signal
import sys
import time

_file = os.environ.get("BATON_FAULTS_HANG_FILE", "")


def _hang(signum, frame):
    with open(_file) as file:
        end = time.monotonic() + float(file.read())
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


if _file:
    signal.signal(signal.SIGUSR2, _hang)

# Python imports the first of this name only; whoever comes behind on the path has its turn too.
for _entry in sys.path:
    _other = os.path.join(_entry, "sitecustomize.py")
    if os.path.isfile(_other) and not os.path.samefile(_other, __file__):
        runpy.run_path(_other)
        break
