"""With --record-prompts the text of a request is in its span at the router, cut at the bound, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.v1 import chat_pb2, inference_pb2, sampling_pb2
from tests.fixtures.otlp import Span, place
from tests.fixtures.traced import traced_mesh

BOUND = 256
LONG, IDS, REFUSED, CANCELLED = (f"{number:032x}" for number in range(1, 5))
PARENT = "b7ad6b7169203331"
SECRET = "quartz"
TEXTS = ("gen_ai.input.messages", "gen_ai.output.messages")


def asked(trace_id: str) -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{trace_id}-{PARENT}-01"),)


def texts(spans: list[Span]) -> tuple[list[Any], list[Any]]:
    """What the router's span holds; no other span holds any."""
    (root,) = (span for span in spans if span.parent_id == PARENT)
    assert place(root)[0] == "router"
    for span in spans:
        if span is not root:
            assert SECRET not in repr(span.attributes)
            assert not any(name in span.attributes for name in TEXTS)
    told = [root.attributes[name] for name in TEXTS]
    assert all(len(text.encode()) <= BOUND for text in told)
    return json.loads(told[0]), json.loads(told[1])


async def test_text_is_recorded_where_it_was_switched_on(small_model: Path) -> None:
    prompt = f"{SECRET} " * 60
    flags = ("--record-prompts", "--record-prompts-bytes", str(BOUND))
    async with traced_mesh(small_model, cache=True, router_flags=flags) as (mesh, collector), mesh.stub() as stub:
        assert "--record-prompts: the text of prompts and answers" in mesh.router.log.read_text()
        sampling = sampling_pb2.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        answer = await stub.Generate(
            inference_pb2.GenerateRequest(text=prompt, sampling=sampling), metadata=asked(LONG), timeout=60
        )
        ids = (await stub.Tokenize(inference_pb2.TokenizeRequest(text=SECRET), timeout=60)).token_ids
        await stub.Generate(
            inference_pb2.GenerateRequest(token_ids=sampling_pb2.TokenIds(ids=ids), sampling=sampling),
            metadata=asked(IDS),
            timeout=60,
        )
        message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=[chat_pb2.ContentPart(text=SECRET)])
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Chat(
                inference_pb2.ChatRequest(messages=[message], model="another"), metadata=asked(REFUSED), timeout=60
            )
        call = stub.StreamGenerate(
            inference_pb2.StreamGenerateRequest(
                text=SECRET, sampling=sampling_pb2.SamplingParams(max_tokens=400, ignore_eos=True)
            ),
            metadata=asked(CANCELLED),
            timeout=60,
        )
        heard = ""
        async for event in call:
            heard += event.chunk.text
            if len(heard) > 4:
                call.cancel()
                break
    traces = collector.traces()

    (question,), (reply,) = texts(traces[LONG])
    assert question["role"] == "user"
    content = question["parts"][0]["content"]
    assert prompt.startswith(content)
    assert BOUND - 80 < len(content) < BOUND < len(prompt), "cut, and not far below the bound"
    assert reply == {
        "role": "assistant",
        "parts": [{"type": "text", "content": answer.text}],
        "finish_reason": "length",
    }

    (question,), _ = texts(traces[IDS])
    assert SECRET in question["parts"][0]["content"], "ids are told as text"

    (refused,) = traces[REFUSED]
    assert not any(name in refused.attributes for name in TEXTS)

    (question,), (reply,) = texts(traces[CANCELLED])
    assert question["parts"][0]["content"] == SECRET
    assert reply["finish_reason"] == "error"
    assert reply["parts"][0]["content"].startswith(heard)
