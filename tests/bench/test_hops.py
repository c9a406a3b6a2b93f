"""What a token costs: processor time of the right process, for the right number of tokens."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from baton.bench.hops import hop_cost
from baton.bench.processor_time import processor_ns
from baton.bench.relay import bare_relay


def test_processor_time_is_that_of_the_process() -> None:
    before, known_before = processor_ns(os.getpid()), time.process_time_ns()
    while time.process_time_ns() - known_before < 50_000_000:
        pass
    known_after, after = time.process_time_ns(), processor_ns(os.getpid())
    assert known_after - known_before <= after - before


def test_processor_time_of_another_process_counts_its_threads_and_no_waiting() -> None:
    burn = "import threading, time\ndef f():\n while time.process_time() < 0.3: pass\n"
    code = f"{burn}t = threading.Thread(target=f); t.start(); t.join(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        burned = processor_ns(process.pid)
        assert burned >= 300_000_000
        time.sleep(0.3)
        assert processor_ns(process.pid) - burned < 100_000_000, "it waits"
        process.communicate(b"\n")
    with pytest.raises(OSError, match="Invalid argument"):
        processor_ns(process.pid)


async def test_a_bare_relay_passes_on_every_message() -> None:
    async with bare_relay(0.001) as relay:
        cost = await hop_cost(relay, relay.pids, [(1,), (2,)], 30)
    assert cost.tokens_per_message == 1.0
    assert cost.interval >= 0.001
    assert set(cost.microseconds) == {"source", "relay"}
    assert min(cost.microseconds.values()) > 0
