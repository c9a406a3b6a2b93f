"""What is told of one request: a span for each call and each phase of it, in the conventions' words, and no text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from tests.fixtures.otlp import Receiver, Span, place
from tests.fixtures.traced import traced_mesh

TRACE, REFUSED, LARGE_SEED = "1" * 32, "2" * 32, "3" * 32
PARENT = "b7ad6b7169203331"

ROOT = ("router", "baton.v1.Inference/Generate", 2)
JOIN = "baton.internal.v1.ResponseCache/Join"
DECODE, PREFILL = "baton.internal.v1.Decode/Generate", "baton.internal.v1.Prefill/Prefill"

CALLS = {
    # service, method, kind (2 server, 3 client) -> parent
    ROOT: None,
    ("router", JOIN, 3): ROOT,
    ("cache", JOIN, 2): ("router", JOIN, 3),
    ("router", DECODE, 3): ROOT,
    ("decode", DECODE, 2): ("router", DECODE, 3),
    ("decode", PREFILL, 3): ("decode", DECODE, 2),
    ("prefill", PREFILL, 2): ("decode", PREFILL, 3),
}
PHASES = {
    # service, name, kind (1 internal) -> parent
    ("cache", "cache get", 1): ("cache", JOIN, 2),
    ("decode", "queue", 1): ("decode", DECODE, 2),
    ("decode", "kv receive", 1): ("decode", DECODE, 2),
    ("prefill", "queue", 1): ("prefill", PREFILL, 2),
    ("prefill", "prefill chunk", 1): ("prefill", PREFILL, 2),
    ("prefill", "kv send", 1): ("prefill", PREFILL, 2),
    ("decode", "decode", 1): ("decode", DECODE, 2),
    ("cache", "cache put", 1): ("cache", JOIN, 2),
}

CLOCK_NS = 1_000_000
"""Phases are told by another clock of the same host."""

SECRET = "quartz"
PROMPT = "".join(f"{SECRET} {number}, " for number in range(8))
"""Any part of it that is worth the name holds the secret. 80 tokens: the tokenizer makes one of each byte."""


@dataclass(frozen=True)
class Remote:
    """A request that went through all services, and what was told of it."""

    answer: inference_pb2.GenerateResponse
    addresses: dict[str, str]
    collector: Receiver

    def spans(self) -> list[Span]:
        """Those of the request."""
        return self.collector.traces()[TRACE]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remote(small_model: Path) -> AsyncIterator[Remote]:
    """A request whose prompt was computed remotely and whose answer was stored; one refused, one with a large seed."""
    flags = ("--local-prefill-tokens", "0")
    async with traced_mesh(small_model, cache=True, decode_flags=flags) as (mesh, collector), mesh.stub() as stub:
        answer = await stub.Generate(
            inference_pb2.GenerateRequest(
                text=PROMPT,
                sampling=sampling_pb2.SamplingParams(max_tokens=16, temperature=0, seed=2**63 - 1),
            ),
            metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),),
            timeout=60,
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(
                inference_pb2.GenerateRequest(text=PROMPT * 10),
                metadata=(("traceparent", f"00-{REFUSED}-{PARENT}-01"),),
                timeout=60,
            )
        await stub.Generate(
            inference_pb2.GenerateRequest(text=SECRET, sampling=sampling_pb2.SamplingParams(max_tokens=1, seed=2**63)),
            metadata=(("traceparent", f"00-{LARGE_SEED}-{PARENT}-01"),),
            timeout=60,
        )
        addresses = {name.partition("-")[0]: service.address for name, service in mesh.services.items()}
    yield Remote(answer, addresses, collector)


def test_one_request_is_one_tree(remote: Remote) -> None:
    """Every call and every phase, each with the right parent, and within its time."""
    spans = {place(span): span for span in remote.spans()}
    assert {span.trace_id for span in remote.collector.spans} == {TRACE, REFUSED, LARGE_SEED}
    assert spans.keys() == CALLS.keys() | PHASES.keys()
    # Of all phases there is one, but the prompt may be computed in several chunks.
    assert len([span for span in remote.spans() if span.name != "prefill chunk"]) == len(spans) - 1
    for where, parent in {**CALLS, **PHASES}.items():
        for span in remote.spans():
            if place(span) == where:
                assert span.parent_id == (PARENT if parent is None else spans[parent].span_id)
    for where, parent in PHASES.items():
        assert spans[parent].start_ns - CLOCK_NS <= spans[where].start_ns
        assert spans[where].end_ns <= spans[parent].end_ns + CLOCK_NS


def test_phases_say_what_they_did(remote: Remote) -> None:
    """The handoff shows who waited for whom, and both sides tell the same."""
    spans = {place(span): span for span in remote.spans()}
    received = spans["decode", "kv receive", 1]
    sent = spans["prefill", "kv send", 1]
    assert received.attributes.keys() == {
        "baton.transport",
        "baton.handoff.bytes",
        "baton.handoff.chunks",
        "baton.handoff.hidden_ms",
        "baton.handoff.exposed_ms",
    }
    assert received.attributes["baton.transport"] == sent.attributes["baton.transport"] == "shm"
    for figure in ("baton.handoff.bytes", "baton.handoff.chunks"):
        assert received.attributes[figure] == sent.attributes[figure] > 0
    assert received.attributes["baton.handoff.bytes"] % len(PROMPT) == 0, "as many for each token"
    milliseconds = (received.end_ns - received.start_ns) / 1e6
    assert 0 <= received.attributes["baton.handoff.hidden_ms"] < milliseconds
    assert 0 < received.attributes["baton.handoff.exposed_ms"] < milliseconds
    chunks = [span for span in remote.spans() if span.name == "prefill chunk"]
    assert sum(span.attributes["baton.tokens"] for span in chunks) == len(PROMPT)
    decode = spans["decode", "decode", 1].attributes
    assert decode["baton.tokens"] == len(remote.answer.token_ids) - 1, "the first came with the KV"
    assert decode["baton.engine.compute_ms"] > 0
    assert 0 < decode["baton.itl_ms.p50"] <= decode["baton.itl_ms.p99"] <= decode["baton.itl_ms.max"]
    assert spans["cache", "cache put", 1].attributes["baton.cache.bytes"] > 0
    assert not any(spans[where].error or "error.type" in spans[where].attributes for where in PHASES)


def test_calls_are_told_by_the_conventions(remote: Remote) -> None:
    """OpenTelemetry's for gRPC: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/."""
    spans = {place(span): span for span in remote.spans()}
    for where in CALLS:
        span, (_, method, kind) = spans[where], where
        told = {key: value for key, value in span.attributes.items() if key.startswith(("rpc.", "server.", "error."))}
        code = told.pop("rpc.response.status_code")
        assert code == "OK"
        assert not span.error
        expected: dict[str, object] = {"rpc.system.name": "grpc", "rpc.method": method}
        if kind == 3:
            called = next(service for (service, name, kind) in CALLS if name == method and kind == 2)
            host, _, port = remote.addresses[called].partition(":")
            expected |= {"server.address": host, "server.port": int(port)}
        assert told == expected


def test_a_request_is_told_by_the_conventions(remote: Remote) -> None:
    """OpenTelemetry's for generative AI: on the client's call, and nowhere else."""
    (root,) = (span for span in remote.spans() if place(span) == ROOT)
    told = {key: value for key, value in root.attributes.items() if key.startswith("gen_ai.")}
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": remote.answer.model,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 2**63 - 1,
        "gen_ai.response.id": remote.answer.request_id,
        "gen_ai.response.model": remote.answer.model,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(PROMPT),
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    others = [span for span in remote.spans() if span is not root]
    assert not any(key.startswith("gen_ai.") for span in others for key in span.attributes)


def test_the_ledger_is_told_twice(remote: Remote) -> None:
    """Of the whole request and up to the first token: as in the answer, each entry, and they add up."""
    (root,) = (span for span in remote.spans() if place(span) == ROOT)
    ledger = remote.answer.summary.ledger
    expected: dict[str, float] = {}
    for prefix, partition in (("baton.ledger.", ledger.total), ("baton.ledger.first_token.", ledger.first_token)):
        entries = {
            f"{ledger_pb2.Hop.Name(e.hop)[4:]}.{ledger_pb2.Kind.Name(e.kind)[5:]}".lower(): e.duration.ToNanoseconds()
            for e in partition.entries
        }
        assert "prefill.compute" in entries
        entries["residual"] = partition.residual.ToNanoseconds()
        entries["total"] = sum(entries.values())
        entries["hidden_transfer"] = partition.hidden_transfer.ToNanoseconds()
        expected |= {f"{prefix}{name}_ms": pytest.approx(ns / 1e6) for name, ns in entries.items()}
    told = {key: value for key, value in root.attributes.items() if key.startswith("baton.ledger.")}
    assert told == expected
    assert 0 < told["baton.ledger.first_token.total_ms"] < told["baton.ledger.total_ms"]


def test_a_seed_that_no_attribute_can_hold_is_left_out(remote: Remote) -> None:
    (root,) = (span for span in remote.collector.traces()[LARGE_SEED] if place(span) == ROOT)
    assert "gen_ai.request.max_tokens" in root.attributes
    assert "gen_ai.request.seed" not in root.attributes


def test_a_refused_request_is_no_error_of_the_router(remote: Remote) -> None:
    (span,) = remote.collector.traces()[REFUSED]
    assert not span.error
    assert "error.type" not in span.attributes
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.attributes["baton.error.reason"] == "INVALID_ARGUMENT"


def test_no_text_is_recorded(remote: Remote) -> None:
    """Neither prompt nor answer: in no attribute, event or status of any span, and not as token ids either."""
    told = b"".join(request.SerializeToString() for request in remote.collector.requests)
    assert DECODE.encode() in told
    assert SECRET.encode() not in told
    assert len(remote.answer.text) > 8
    assert remote.answer.text[:8].encode() not in told
    values = [value for span in remote.collector.spans for value in span.attributes.values()]
    assert all(value == ["length"] for value in values if isinstance(value, list))
    assert not any(isinstance(value, bytes) for value in values)
    assert b".messages" not in told, "no attribute for it either: there is a switch, and it is off"
