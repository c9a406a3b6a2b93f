"""What holds for the whole suite."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.fixtures import zygote

# A shell that runs the suite in the background has its children ignore Ctrl-C, and they pass that on to theirs: the
# commands under test would be deaf to it, as they should be.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def engines_are_forked() -> Iterator[None]:
    """Importing torch is most of what an engine's start costs, and the suite starts hundreds."""
    with zygote.serving():
        yield
