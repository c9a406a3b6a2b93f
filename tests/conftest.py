"""What holds for the whole suite."""

from __future__ import annotations

import signal

# A shell that runs the suite in the background has its children ignore Ctrl-C, and they pass that on to theirs: the
# commands under test would be deaf to it, as they should be.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
