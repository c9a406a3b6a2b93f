"""What the router's metrics say: before the first request, and of each kind of request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY
from prometheus_client.samples import Sample

from baton.v1 import chat_pb2, inference_pb2, ledger_pb2, sampling_pb2
from baton_router import metrics
from baton_router.arrivals import Arrivals
from tests.fixtures import exposition
from tests.fixtures.exposition import Series, series
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedCache, ScriptedWorker, token_at
from tests.router.test_stream import collect

METHODS = ["Generate", "StreamGenerate", "Chat", "StreamChat", "Tokenize", "Detokenize", "ListModels", "GetModel"]
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
    "deadline_unreachable",
    "quota_exceeded",
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


@pytest.mark.parametrize("method", METHODS)
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
    """The sum over this process's series with these labels, now."""
    return summed(samples(), name, labels)


def samples() -> list[Sample]:
    return [sample for family in REGISTRY.collect() for sample in family.samples]


def summed(found: list[Sample], name: str, labels: dict[str, str]) -> float:
    return sum(sample.value for sample in found if sample.name == name and labels.items() <= sample.labels.items())


def test_an_entry_below_zero_counts_as_none() -> None:
    before = value("baton_ledger_seconds_sum", hop="decode", kind="network")
    summary = inference_pb2.Summary()
    entry = summary.ledger.total.entries.add(hop=ledger_pb2.HOP_DECODE, kind=ledger_pb2.KIND_NETWORK)
    entry.duration.FromNanoseconds(-5_000_000)
    metrics.record("Generate", "tiny", "cancelled", summary, Arrivals())
    assert value("baton_ledger_seconds_sum", hop="decode", kind="network") == before


ITL = "baton_inter_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
DURATION = "gen_ai_server_request_duration_seconds"
CALLS = "baton_requests_total"
TTFT = "gen_ai_server_time_to_first_token_seconds"
TOKENS = "baton_completion_tokens_total"


class Rise:
    """How far series of this process rose since."""

    def __init__(self) -> None:
        self._before = samples()

    def of(self, name: str, **labels: str) -> float:
        return value(name, **labels) - summed(self._before, name, labels)


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
            partition = last.summary.ledger.first_token
            names = [
                (ledger_pb2.Hop.Name(e.hop)[4:].lower(), ledger_pb2.Kind.Name(e.kind)[5:].lower())
                for e in partition.entries
            ]
            assert {hop for hop, _ in names} == expected
            for (hop, kind), entry in zip(names, partition.entries, strict=True):
                told = rise.of("baton_ledger_first_token_seconds_sum", hop=hop, kind=kind, cache=status)
                # The scripted worker reports fixed times; where that is more than it took, the rest is below zero.
                assert told == pytest.approx(max(0.0, entry.duration.ToNanoseconds() / 1e9))
            assert rise.of("baton_ledger_first_token_seconds_count", cache=status) == len(names)
            whole = sum(entry.duration.ToNanoseconds() for entry in partition.entries) / 1e9
            assert rise.of(f"{TTFT}_sum", cache=status) == pytest.approx(whole)
            assert rise.of("baton_ledger_seconds_count", hop="router", kind="tokenize") == 1
            await eventually(lambda: len(cache.stored) == 1)


async def test_the_conventions_attributes_are_labels(router: Router) -> None:
    """Of those that were understood; no name that a client made up becomes one."""
    model = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models[0].name
    rise = Rise()
    await collect(router.stub.StreamGenerate(ask()))
    text = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "baton"}
    named = text | {"gen_ai_request_model": model, "gen_ai_response_model": model}
    assert (rise.of(f"{TTFT}_count", **named), rise.of(f"{TPOT}_count", **named)) == (1, 1)
    assert rise.of(f"{DURATION}_count", **named, error_type="") == rise.of(f"{DURATION}_count") == 1
    rise = Rise()
    message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="fox")])
    with pytest.raises(grpc.aio.AioRpcError):
        await router.stub.Chat(inference_pb2.ChatRequest(model="made up", messages=[message]))
    unknown = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "", "gen_ai_response_model": ""}
    assert rise.of(f"{DURATION}_count", **unknown, error_type="model_not_found") == rise.of(f"{DURATION}_count") == 1


async def test_other_calls_are_counted_by_their_end(router: Router) -> None:
    """And in nothing that is about generations."""
    rise = Rise()
    tokenized = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="fox"))
    await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokenized.token_ids))
    (model,) = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
    await router.stub.GetModel(inference_pb2.GetModelRequest(name=model.name))
    with pytest.raises(grpc.aio.AioRpcError):
        await router.stub.GetModel(inference_pb2.GetModelRequest(name="made up"))
    with pytest.raises(grpc.aio.AioRpcError):
        await router.stub.Tokenize(inference_pb2.TokenizeRequest())
    told = {(m, o): n for m in METHODS for o in OUTCOMES if (n := rise.of(CALLS, method=m, outcome=o))}
    assert told == {
        ("Tokenize", "ok"): 1,
        ("Tokenize", "invalid_argument"): 1,
        ("Detokenize", "ok"): 1,
        ("ListModels", "ok"): 1,
        ("GetModel", "ok"): 1,
        ("GetModel", "model_not_found"): 1,
    }
    assert rise.of(f"{DURATION}_count") == 0


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
