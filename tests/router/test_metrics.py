"""What the router's metrics say: before the first request, and of each kind of request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton_router import metrics
from baton_router.arrivals import Arrivals
from tests.fixtures import exposition
from tests.fixtures.exposition import Series, series
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedCache, ScriptedWorker, token_at
from tests.router.test_stream import collect

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
    return exposition.at_start("baton_router")


@pytest.mark.parametrize("tier", ["decode", "prefill"])
def test_a_router_that_never_saw_a_worker_says_so(at_start: dict[Series, float], tier: str) -> None:
    assert at_start[series("baton_workers", tier=tier)] == 0


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate", "Chat", "StreamChat"])
def test_the_first_failure_of_a_kind_is_a_rise(at_start: dict[Series, float], method: str) -> None:
    for outcome in OUTCOMES:
        assert at_start[series("baton_requests_total", method=method, outcome=outcome)] == 0


@pytest.mark.parametrize("what", ["lookup", "fill", "fill_dropped"])
def test_the_first_cache_failure_is_a_rise(at_start: dict[Series, float], what: str) -> None:
    assert at_start[series("baton_response_cache_failures_total", what=what)] == 0


@pytest.mark.parametrize("status", ["hit", "miss", "bypass"])
def test_the_first_hit_is_a_rise(at_start: dict[Series, float], status: str) -> None:
    assert at_start[series("baton_response_cache_total", status=status)] == 0


def value(name: str, **labels: str) -> float:
    """A series of this process now."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_an_entry_below_zero_counts_as_none() -> None:
    before = value("baton_ledger_seconds_sum", hop="decode", kind="network")
    summary = inference_pb2.Summary()
    entry = summary.ledger.total.entries.add(hop=ledger_pb2.HOP_DECODE, kind=ledger_pb2.KIND_NETWORK)
    entry.duration.FromNanoseconds(-5_000_000)
    metrics.record("Generate", "cancelled", summary, Arrivals())
    assert value("baton_ledger_seconds_sum", hop="decode", kind="network") == before


ITL = "baton_inter_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
TTFT = "gen_ai_server_time_to_first_token_seconds"
TOKENS = "baton_completion_tokens_total"


class Rise:
    """How far series of this process rose since."""

    def __init__(self) -> None:
        self._before = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def of(self, name: str, **labels: str) -> float:
        return value(name, **labels) - self._before.get((name, frozenset(labels.items())), 0.0)


def ask(max_tokens: int = 6, resume_from: int = 0) -> inference_pb2.StreamGenerateRequest:
    request = inference_pb2.StreamGenerateRequest(
        text="fox", sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=5)
    )
    if resume_from:
        request.resume_from.ids.extend(token_at(i) for i in range(resume_from))
    return request


@pytest.fixture
async def cache() -> AsyncIterator[ScriptedCache]:
    async with ScriptedCache.running() as one:
        yield one


async def test_a_cache_hit_generates_nothing(router_model: Path, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    async with running_router(router_model, decode_targets=worker.address, cache_target=cache.address) as router:
        rise = Rise()
        await collect(router.stub.StreamGenerate(ask()))
        assert (rise.of(f"{ITL}_count"), rise.of(f"{TPOT}_count"), rise.of(TOKENS)) == (5, 1, 6)
        assert (rise.of(f"{TTFT}_count", cache="miss"), rise.of(f"{TTFT}_count", cache="hit")) == (1, 0)
        await eventually(lambda: len(cache.stored) == 1)
        rise = Rise()
        messages = await collect(router.stub.StreamGenerate(ask()))
        assert messages[-1].summary.cache_status == inference_pb2.CACHE_STATUS_HIT
        assert (rise.of(f"{ITL}_count"), rise.of(f"{TPOT}_count"), rise.of(TOKENS)) == (0, 0, 0)
        assert (rise.of(f"{TTFT}_count", cache="miss"), rise.of(f"{TTFT}_count", cache="hit")) == (0, 1)


async def test_the_first_tokens_entries_sum_to_it(
    router_model: Path, worker: ScriptedWorker, cache: ScriptedCache
) -> None:
    """By cache status, so that what hits do can be left out; and the whole's entries are untouched by it."""
    async with running_router(router_model, decode_targets=worker.address, cache_target=cache.address) as router:
        for status, expected in (("miss", {"router", "cache", "decode"}), ("hit", {"router", "cache"})):
            rise = Rise()
            (*_, last) = await collect(router.stub.StreamGenerate(ask()))
            entries = last.summary.ledger.first_token.entries
            assert {ledger_pb2.Hop.Name(entry.hop).removeprefix("HOP_").lower() for entry in entries} == expected
            names = ledger_pb2.Kind.DESCRIPTOR.values_by_name
            told = {
                (hop, kind): rise.of("baton_ledger_first_token_seconds_sum", hop=hop, kind=kind, cache=status)
                for hop in ("router", "cache", "decode", "prefill")
                for kind in (name.removeprefix("KIND_").lower() for name in names)
            }
            assert sum(told.values()) == pytest.approx(rise.of(f"{TTFT}_sum", cache=status))
            assert {hop for (hop, _), seconds in told.items() if seconds} == expected
            assert rise.of("baton_ledger_seconds_count", hop="router", kind="tokenize") == 1
            await eventually(lambda: len(cache.stored) == 1)


async def test_tokens_resumed_from_were_not_generated_again(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.02
    rise = Rise()
    messages = await collect(router.stub.StreamGenerate(ask(8, resume_from=4)))
    assert messages[-1].summary.usage.completion_tokens == 8
    assert rise.of(TOKENS) == 4
    assert rise.of(f"{ITL}_count") == 3
    assert rise.of(f"{TPOT}_sum") >= 0.02


async def test_a_client_that_reads_late_does_not_slow_the_tokens(router: Router, worker: ScriptedWorker) -> None:
    worker.text = "x" * 200_000  # more than the transport takes from us while nobody reads
    rise = Rise()
    call = aiter(router.stub.StreamGenerate(ask(100)))
    await anext(call)
    await asyncio.sleep(1.5)
    messages = await collect(call)
    stall = {(e.hop, e.kind): e.duration for e in messages[-1].summary.ledger.total.entries}
    assert stall[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_STALL].ToNanoseconds() > 1e9
    assert rise.of(f"{ITL}_count") == rise.of(f"{ITL}_bucket", le="0.5") == 99
    assert rise.of(f"{TPOT}_sum") < 0.01


def test_the_pace_is_of_what_came_after_the_first_message() -> None:
    arrivals = Arrivals()
    assert arrivals.take(3, 1_000) is None
    assert arrivals.seconds_per_token() is None
    assert arrivals.take(1, 3_000) == 2_000
    assert arrivals.take(3, 9_000) == 6_000
    assert arrivals.tokens == 7
    assert arrivals.seconds_per_token() == pytest.approx(2_000e-9)
