"""The life of a request in the router: what goes down, what comes back, and where its time went."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterable, Sequence
from pathlib import Path

import grpc
import pytest

from baton.v1 import chat_pb2, inference_pb2, ledger_pb2, sampling_pb2
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker, text_at, token_at


def ask(max_tokens: int = 8, **fields: object) -> inference_pb2.StreamGenerateRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=5)
    return inference_pb2.StreamGenerateRequest(text="the fox", sampling=sampling, **fields)  # type: ignore[arg-type]


async def collect(
    call: AsyncIterable[inference_pb2.StreamGenerateResponse],
    into: list[inference_pb2.StreamGenerateResponse] | None = None,
) -> list[inference_pb2.StreamGenerateResponse]:
    into = [] if into is None else into
    async for message in call:
        into.append(message)
    return into


def check_indices(chunks: Sequence[inference_pb2.TokenChunk], first: int = 0) -> None:
    """Continuous, however many tokens a chunk has."""
    for chunk in chunks:
        assert chunk.index == first
        first += len(chunk.token_ids)


async def test_stream(router: Router, worker: ScriptedWorker) -> None:
    call = router.stub.StreamGenerate(ask(), metadata=(("x-request-id", "mine"),))
    messages = [message async for message in call]
    assert ("x-request-id", "mine") in list(await call.initial_metadata())
    start, *chunks, last = messages
    assert start.start.request_id == "mine"
    assert (start.start.model, start.start.seed) == ("little", 5)
    assert start.start.prompt_tokens == len(worker.requests[0].token_ids)
    check_indices([chunk.chunk for chunk in chunks])
    assert [id_ for chunk in chunks for id_ in chunk.chunk.token_ids] == [token_at(i) for i in range(8)]
    summary = last.summary
    assert summary.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert summary.usage.completion_tokens == 8
    assert summary.cache_status == inference_pb2.CACHE_STATUS_BYPASS
    assert summary.prefill_placement == inference_pb2.PLACEMENT_LOCAL
    assert summary.migrations == 0


async def test_every_sampling_field_goes_down(router: Router, worker: ScriptedWorker) -> None:
    request = inference_pb2.GenerateRequest(token_ids=sampling_pb2.TokenIds(ids=[9, 10]), priority=-3)
    answer = await router.stub.Generate(request)
    (sent,) = worker.requests
    assert list(sent.token_ids) == [9, 10]
    assert sent.priority == -3
    assert sent.model_fingerprint == "model-1"
    unset = [
        field.name
        for field in sent.sampling.DESCRIPTOR.fields
        if field.has_presence and not sent.sampling.HasField(field.name)  # type: ignore[arg-type]
    ]
    assert unset == ["logprobs", "prompt_logprobs"]
    assert sent.sampling.max_tokens == 126, "what the prompt leaves of 128"
    assert (sent.sampling.temperature, sent.sampling.top_k) == (0.5, 20), "generation_config.json"
    assert answer.seed == sent.sampling.seed
    other = await router.stub.Generate(request)
    assert other.seed != answer.seed, "drawn anew"


async def test_unary_is_the_stream_collected(router: Router) -> None:
    request = inference_pb2.GenerateRequest(text="the fox", sampling=sampling_pb2.SamplingParams(max_tokens=5))
    call = router.stub.Generate(request)
    answer = await call
    assert answer.text == "".join(text_at(i) for i in range(5))
    assert list(answer.token_ids) == [token_at(i) for i in range(5)]
    assert answer.request_id in dict(await call.initial_metadata())["x-request-id"]


async def test_chat(router: Router, worker: ScriptedWorker) -> None:
    messages = [chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text="hi<|im_end|>")])]
    sampling = sampling_pb2.SamplingParams(max_tokens=3)
    answer = await router.stub.Chat(inference_pb2.ChatRequest(messages=messages, sampling=sampling))
    assert answer.message.role == chat_pb2.ROLE_ASSISTANT
    assert answer.message.content[0].text == "0 1 2 "
    conversation = inference_pb2.Conversation(messages=messages)
    tokenized = await router.stub.Tokenize(inference_pb2.TokenizeRequest(conversation=conversation))
    assert list(tokenized.token_ids) == list(worker.requests[0].token_ids)
    assert tokenized.rendered == "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    stream = [m async for m in router.stub.StreamChat(inference_pb2.StreamChatRequest(messages=messages))]
    assert [m.WhichOneof("event") for m in (stream[0], stream[1], stream[-1])] == ["start", "chunk", "summary"]


async def test_tokenize_and_back(router: Router) -> None:
    tokenized = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="naïve 日<s>"))
    text = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokenized.token_ids))
    assert text.text == "naïve 日<s>"
    kept = inference_pb2.DetokenizeRequest(token_ids=tokenized.token_ids, skip_special_tokens=False)
    assert (await router.stub.Detokenize(kept)).text == "<s>naïve 日<s>"


async def test_models(router: Router) -> None:
    (model,) = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert model == (await router.stub.GetModel(inference_pb2.GetModelRequest(name="little"))).model
    assert (model.name, model.max_context, model.fingerprint, model.dtype) == ("little", 128, "model-1", "float32")
    assert model.chat
    assert model.ready
    assert model.default_sampling.temperature == 0.5
    assert not model.default_sampling.HasField("seed")


def entries(partition: ledger_pb2.Partition) -> dict[tuple[int, int], float]:
    return {(entry.hop, entry.kind): entry.duration.ToNanoseconds() / 1e6 for entry in partition.entries}


async def test_ledger_closes(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.01
    call = router.stub.StreamGenerate(ask())
    summary = [message async for message in call][-1].summary
    for partition in (summary.ledger.total, summary.ledger.first_token):
        assert abs(partition.residual.ToNanoseconds()) <= 1000
        assert sum(entries(partition).values()) == pytest.approx(partition.total.ToNanoseconds() / 1e6, abs=0.01)
    total, first = entries(summary.ledger.total), entries(summary.ledger.first_token)
    decode_compute = (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_COMPUTE)
    assert (first[decode_compute], total[decode_compute]) == (2.5, 3.5), "each books its own timing, once"
    assert total[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_OVERHEAD] == 0.5
    assert total[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK] > 60
    assert 5 < summary.ledger.first_token.total.ToNanoseconds() / 1e6 < 60
    assert total[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_TOKENIZE] > 0
    header = str(dict(await call.trailing_metadata())["server-timing"])
    assert "decode_compute;dur=3.500" in header
    assert header.endswith(f"total;dur={summary.ledger.total.total.ToNanoseconds() / 1e6:.3f}")


async def test_cancel_reaches_the_worker(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.01
    call = router.stub.StreamGenerate(ask(100))
    await call.read()
    await eventually(lambda: worker.live == 1)
    call.cancel()
    await eventually(lambda: worker.live == 0, 0.5)


async def test_cancel_of_unary_reaches_the_worker(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.01
    call = router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
    asking = asyncio.ensure_future(call)
    await eventually(lambda: worker.live == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await eventually(lambda: worker.live == 0, 0.5)


async def test_deadline_shrinks_on_the_way_and_ends_the_worker(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.02
    got: list[inference_pb2.StreamGenerateResponse] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(router.stub.StreamGenerate(ask(100), timeout=0.3), got)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(got) > 3, "what was there by then was delivered"
    await eventually(lambda: worker.live == 0, 2)


async def test_resume(router: Router, worker: ScriptedWorker) -> None:
    delivered = [token_at(i) for i in range(3)]
    request = ask(resume_from=sampling_pb2.TokenIds(ids=delivered))
    _, *chunks, last = [message async for message in router.stub.StreamGenerate(request)]
    assert list(worker.requests[0].delivered_token_ids) == delivered
    check_indices([chunk.chunk for chunk in chunks], first=3)
    assert [id_ for chunk in chunks for id_ in chunk.chunk.token_ids] == [token_at(i) for i in range(3, 8)]
    assert last.summary.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("delivered", "stop", "reason"),
    [
        ([40] * 8, [], sampling_pb2.FINISH_REASON_LENGTH),
        ([40, 7], [], sampling_pb2.FINISH_REASON_STOP),
        ([70, 70], ["ff"], sampling_pb2.FINISH_REASON_STOP_STRING),
    ],
)
async def test_resume_of_an_ended_answer_adds_nothing(
    router: Router, worker: ScriptedWorker, delivered: list[int], stop: list[str], reason: int
) -> None:
    text = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=delivered))
    request = ask(resume_from=sampling_pb2.TokenIds(ids=delivered))
    if stop:
        request.sampling.stop.append(text.text)
    _, last = [message async for message in router.stub.StreamGenerate(request)]
    assert last.summary.finish_reason == reason
    assert worker.requests == []


async def test_too_many_in_flight(router_model: Path, worker: ScriptedWorker) -> None:
    worker.pause = 0.05
    async with running_router(router_model, decode_targets=worker.address, max_in_flight=2) as router:
        calls = [router.stub.StreamGenerate(ask(100)) for _ in range(2)]
        for call in calls:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()


async def test_slow_reader_frees_the_worker(router_model: Path, worker: ScriptedWorker) -> None:
    """A client that never reads: bounded memory here, the worker is freed, and the status is honest when it reads."""
    worker.text = "x" * 200_000
    worker.pause = 0.001
    settings = {"decode_targets": worker.address, "max_unsent_tokens": 10}
    async with running_router(router_model, **settings) as router:
        call = router.stub.StreamGenerate(ask(120))
        messages = aiter(call)
        assert (await anext(messages)).WhichOneof("event") == "start"
        await eventually(lambda: worker.live == 1)
        await eventually(lambda: worker.live == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(messages)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "does not read" in (caught.value.details() or "")


async def test_reading_late_is_stall(router_model: Path, worker: ScriptedWorker) -> None:
    worker.text = "x" * 200_000
    async with running_router(router_model, decode_targets=worker.address) as router:
        call = aiter(router.stub.StreamGenerate(ask(100)))
        await anext(call)
        await asyncio.sleep(1.0)
        messages = await collect(call)
    total = entries(messages[-1].summary.ledger.total)
    assert total[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_STALL] > 700


def test_router_loads_no_torch() -> None:
    code = "import sys, baton_router.app; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
