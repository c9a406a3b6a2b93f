"""The blocking client: what goes out, what comes back, and that closing a stream stops the server's work."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from baton.client import (
    BatonRpcError,
    CacheMode,
    CacheStatus,
    Client,
    FieldViolation,
    FinishReason,
    Message,
    Placement,
    Role,
    Transport,
)


def test_generate_returns_the_whole_answer(server: Any) -> None:
    with Client(server.target) as client:
        answer = client.generate("Once", max_tokens=4, temperature=0.0, request_id="mine")
    assert answer.text == "Once upon a time"
    assert answer.token_ids == (1, 2, 3, 4)
    assert (answer.request_id, answer.model, answer.seed) == ("mine", "tiny", 7)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.cache is CacheStatus.MISS
    assert (answer.placement, answer.transport, answer.migrations) == (Placement.REMOTE, Transport.GRPC, 1)
    assert (answer.usage.prompt_tokens, answer.usage.cached_prompt_tokens, answer.usage.completion_tokens) == (3, 1, 4)


def test_ledger_sums_to_its_total(server: Any) -> None:
    with Client(server.target) as client:
        ledger = client.generate("Once").ledger
    assert ledger.first_token is None
    assert ledger.total is not None
    parts = sum(entry.duration_ns for entry in ledger.total.entries)
    assert parts + ledger.total.residual_ns == ledger.total.total_ns == 10_000_000
    assert list(ledger.total.by_kind()) == ["compute", "network", "tokenize"]


def test_unset_options_stay_unset_and_zero_is_sent(server: Any) -> None:
    with Client(server.target) as client:
        client.generate([5, 6], temperature=0.0, stop=["\n"], cache=CacheMode.BYPASS, logit_bias={3: -1.0})
    request = server.inference.requests[0]
    assert list(request.token_ids.ids) == [5, 6]
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0
    assert not request.sampling.HasField("max_tokens")
    assert not request.HasField("priority")
    assert list(request.sampling.stop) == ["\n"]
    assert request.cache_control.mode == CacheMode.BYPASS.value
    assert dict(request.sampling.logit_bias) == {3: -1.0}


def test_how_the_cache_is_used(server: Any) -> None:
    with Client(server.target) as client:
        client.generate([5], cache=CacheMode.REFRESH, cache_ttl=1.5, semantic=True, original_pace=True)
        client.generate([5])
    control, unset = (request.cache_control for request in server.inference.requests)
    assert (control.mode, control.semantic, control.original_pace) == (CacheMode.REFRESH.value, True, True)
    assert control.ttl.ToMilliseconds() == 1500
    assert unset == type(unset)()


def test_an_unknown_option_is_refused_before_anything_is_sent(server: Any) -> None:
    with Client(server.target) as client, pytest.raises(TypeError, match="temprature"):
        client.generate("Once", temprature=1)  # type: ignore[arg-type]
    assert server.inference.requests == []


def test_stream_yields_chunks_then_the_answer(server: Any) -> None:
    with Client(server.target) as client, client.stream("Once") as stream:
        texts = [chunk.text for chunk in stream]
        assert stream.start is not None
        assert stream.start.seed == 7
        answer = stream.answer
        assert list(stream) == []
    assert texts == ["Once", " upon", " a", " time"]
    assert (answer.text, answer.token_ids) == ("Once upon a time", (1, 2, 3, 4))


@pytest.mark.parametrize("way", ["close", "drop"])
def test_leaving_a_stream_cancels_the_call(server: Any, way: str) -> None:
    with Client(server.target) as client:
        stream = client.stream("hang")
        assert next(stream).text == "Once"
        assert server.inference.hanging.wait(5)
        if way == "close":
            stream.close()
            with pytest.raises(BatonRpcError, match="CANCELLED"):
                next(stream)
        else:
            del stream
        assert server.inference.cancelled.wait(5)


def test_a_stream_without_its_summary_is_an_error(server: Any) -> None:
    with Client(server.target) as client, pytest.raises(BatonRpcError, match="before it was complete"):
        _ = client.stream("truncated").answer


def test_field_violations_and_request_id_are_unpacked(server: Any) -> None:
    with Client(server.target) as client, pytest.raises(BatonRpcError) as caught:
        client.generate("invalid", request_id="req-1")
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_ARGUMENT"
    assert error.violations == (FieldViolation("sampling.top_p", "must be in (0, 1]"),)
    assert error.retry_after is None
    assert error.request_id == "req-1"


def test_retry_after_is_unpacked(server: Any) -> None:
    with Client(server.target) as client, pytest.raises(BatonRpcError) as caught:
        next(client.stream("overloaded"))
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert caught.value.retry_after == 2.5


def test_deadline_ends_a_call(server: Any) -> None:
    with Client(server.target) as client, pytest.raises(BatonRpcError) as caught:
        client.generate("hang", timeout=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_chat_and_models(server: Any) -> None:
    conversation = [Message(Role.SYSTEM, "be brief "), Message(Role.USER, "hello")]
    with Client(server.target, metadata=[("x-tenant", "acme")]) as client:
        assert client.chat(conversation).text == "BE BRIEF HELLO"
        assert [chunk.text for chunk in client.stream_chat(conversation)] == ["be brief ", "hello"]
        with pytest.raises(BatonRpcError) as caught:
            client.chat(conversation, model="other")
        assert caught.value.reason == "MODEL_NOT_FOUND"
        (model,) = client.models()
    assert (model.name, model.max_context, model.chat, model.ready) == ("tiny", 1024, True, False)
    assert all(sent["x-tenant"] == "acme" for sent in server.inference.metadata)


def test_wait_ready_names_the_target_nothing_answers_at() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(BatonRpcError, match=r"nothing answers at 127\.0\.0\.1:1"):
        client.wait_ready(0.2)
