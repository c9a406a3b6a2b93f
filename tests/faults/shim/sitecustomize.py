"""Runs first in every process of a faulty mesh: on SIGUSR2 the process's main thread does nothing for a while.

An event loop that is held, or an engine whose device does not answer, from inside a live process: its sockets stay
open, its kernel answers pings of TCP, and nothing else happens. Nothing of this is in the services themselves.
`BATON_FAULTS_HANG_FILE` names the file with the seconds.
"""

import os
import signal
import time

_file = os.environ.get("BATON_FAULTS_HANG_FILE", "")


def _hang(signum, frame):
    with open(_file) as file:
        end = time.monotonic() + float(file.read())
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


if _file:
    signal.signal(signal.SIGUSR2, _hang)
