"""A mesh for a benchmark: its engines run where they were told to, and nothing of it is left."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from baton.bench.streams import Stream, draw_prompts, follow
from baton.cli.bench.local_mesh import Tiers, local_mesh
from tests.fixtures.models import random_llama


@pytest.mark.slow
async def test_engines_run_on_their_cores_and_end_with_the_block(tmp_path: Path) -> None:
    model = random_llama(tmp_path / "small")
    core = max(os.sched_getaffinity(0))
    before = set(psutil.Process().children(recursive=True))
    async with local_mesh(model, Tiers(str(core), str(core)), {}) as source:
        started = set(psutil.Process().children(recursive=True)) - before
        engines = [process for process in started if "baton.engine.process" in process.cmdline()]
        assert len(engines) == 2
        for process in engines:
            assert process.cpu_affinity() == [core]
            assert all(os.sched_getaffinity(thread.id) == {core} for thread in process.threads())
        (prompt,) = draw_prompts(1, 100, 384, 0)
        stream = await follow(source, prompt, 5, Stream())
        assert stream.tokens == 5
        (ledger,) = source.ledgers
        assert ledger.first_token.total.ToNanoseconds() > 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)
