"""What the router's metrics say: before the first request, and of each kind of request."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from baton.v1 import inference_pb2, ledger_pb2
from baton_router import metrics

Series = tuple[str, frozenset[tuple[str, str]]]

OUTCOMES = [
    "ok",
    "cancelled",
    "internal",
    "invalid_argument",
    "model_not_found",
    "not_found",
    "failed_precondition",
    "fingerprint_mismatch",
    "overloaded",
    "slow_reader",
    "unavailable",
    "worker_lost",
    "deadline_exceeded",
]


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


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Chat", "StreamChat"])
def test_the_first_failure_of_a_kind_is_a_rise(at_start: dict[Series, float], method: str) -> None:
    for outcome in OUTCOMES:
        assert at_start["baton_requests_total", frozenset({("method", method), ("outcome", outcome)})] == 0


@pytest.mark.parametrize("what", ["lookup", "fill", "fill_dropped"])
def test_the_first_cache_failure_is_a_rise(at_start: dict[Series, float], what: str) -> None:
    assert at_start["baton_response_cache_failures_total", frozenset({("what", what)})] == 0


def value(name: str, **labels: str) -> float:
    """A series of this process now."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_an_entry_below_zero_counts_as_none() -> None:
    before = value("baton_ledger_seconds_sum", hop="decode", kind="network")
    summary = inference_pb2.Summary()
    entry = summary.ledger.total.entries.add(hop=ledger_pb2.HOP_DECODE, kind=ledger_pb2.KIND_NETWORK)
    entry.duration.FromNanoseconds(-5_000_000)
    metrics.record("Generate", "cancelled", summary)
    assert value("baton_ledger_seconds_sum", hop="decode", kind="network") == before
