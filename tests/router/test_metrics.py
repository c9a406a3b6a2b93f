"""What the router's metrics say: before the first request, and of each kind of request."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture(scope="module")
def at_start() -> dict[Series, float]:
    """All series of a router that was only just imported; this process has served requests already."""
    program = "import baton_router.app, prometheus_client; print(prometheus_client.generate_latest().decode())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
    }


@pytest.mark.parametrize("tier", ["decode", "prefill"])
def test_a_router_that_never_saw_a_worker_says_so(at_start: dict[Series, float], tier: str) -> None:
    assert at_start["baton_workers", frozenset({("tier", tier)})] == 0
