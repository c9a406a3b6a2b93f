"""A collector that does not answer costs spans, each of them counted, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tests.fixtures.otlp import receiver

FILL_AND_END = """
import json, sys, time
from baton.telemetry import tracing

tracing.configure("test", sys.argv[1], 1.0)
for _ in range(6000):
    with tracing.phase("span"):
        pass
began = time.monotonic()
tracing.shutdown()
print(json.dumps(time.monotonic() - began))
"""


async def test_a_process_with_a_full_queue_ends_in_two_seconds() -> None:
    async with receiver() as collector:
        collector.slow_seconds = 600.0
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FILL_AND_END, collector.address, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        took = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        ended = time.monotonic()
        await asyncio.wait_for(process.wait(), 60)
        assert process.returncode == 0
        assert took < 2.7
        # Nothing that runs at the exit of the process waits once more.
        assert time.monotonic() - ended < 1
        assert collector.arrived()
