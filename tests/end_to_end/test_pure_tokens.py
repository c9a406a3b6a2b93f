"""Tokens are a pure function of the request: alone or batched, local or remote prefill, preempted or resumed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from baton.internal.v1 import decode_pb2, decode_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.fixtures.mesh import Service, running_mesh
from tests.fixtures.models import full_sampling

REQUESTS = 100
NEW_TOKENS = 24


async def fingerprint(service: Service) -> str:
    async with grpc.aio.insecure_channel(service.address) as channel:
        async for state in worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest()):
            return state.model.fingerprint
    raise AssertionError("no state")


def request(
    i: int, model: str, prefill: str = "", delivered: list[int] | None = None, max_tokens: int = NEW_TOKENS
) -> decode_pb2.GenerateRequest:
    return decode_pb2.GenerateRequest(
        request_id=f"r{i}-{bool(prefill)}-{len(delivered or ())}-{max_tokens}",
        model_fingerprint=model,
        token_ids=[5 + (i * 7 + j * j) % 370 for j in range(20 + i % 30)],
        delivered_token_ids=delivered or [],
        sampling=full_sampling(
            max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=1000 + i, presence_penalty=0.3 * (i % 2)
        ),
        prefill_candidates=[decode_pb2.PrefillCandidate(target=prefill)] if prefill else [],
    )


async def run(stub: decode_pb2_grpc.DecodeAsyncStub, asked: decode_pb2.GenerateRequest) -> tuple[list[int], int]:
    tokens: list[int] = list(asked.delivered_token_ids)
    preemptions = 0
    async for message in stub.Generate(asked, timeout=60):
        if message.WhichOneof("event") == "tokens":
            assert message.tokens.index == len(tokens)
            tokens += message.tokens.token_ids
        elif message.WhichOneof("event") == "finished":
            preemptions = message.finished.preemptions
    return tokens, preemptions


@pytest.mark.parametrize("prefix_cache", ["--no-prefix-cache", "--prefix-cache"])
async def test_same_tokens_however_they_are_computed(small_model: Path, prefix_cache: str) -> None:
    flags = ("--local-prefill-tokens", "0", "--step-tokens", "32")
    async with running_mesh(small_model, worker_flags=(prefix_cache,), decode_flags=flags) as mesh:
        # This one cannot hold eight requests to their end: some must be preempted and computed again.
        tight = await mesh.start(
            "decode-tight", "--model", str(small_model), *flags, prefix_cache, "--num-slots", "8", "--kv-tokens", "320"
        )
        prefill = mesh.tier("prefill")[0].address
        roomy = mesh.services["decode-0"]
        model = await fingerprint(roomy)
        async with (
            grpc.aio.insecure_channel(roomy.address) as roomy_channel,
            grpc.aio.insecure_channel(tight.address) as tight_channel,
        ):
            stub = decode_pb2_grpc.DecodeStub(roomy_channel)
            tight_stub = decode_pb2_grpc.DecodeStub(tight_channel)
            alone = [(await run(stub, request(i, model)))[0] for i in range(REQUESTS)]
            assert len({tuple(tokens) for tokens in alone}) == REQUESTS
            assert all(len(tokens) == NEW_TOKENS for tokens in alone)
            same = {"batch of 8": 0, "remote": 0, "preempted": 0, "resumed": 0}
            preemptions = 0
            for first in range(0, REQUESTS, 8):
                ids = range(first, min(first + 8, REQUESTS))
                # As long as answers are short, the tight one takes more than it can hold when they are not.
                await asyncio.gather(*(run(tight_stub, request(i, model, max_tokens=1)) for i in range(16)))
                for how, results in {
                    "batch of 8": await asyncio.gather(*(run(stub, request(i, model)) for i in ids)),
                    "remote": await asyncio.gather(*(run(stub, request(i, model, prefill)) for i in ids)),
                    "preempted": await asyncio.gather(*(run(tight_stub, request(i, model, prefill)) for i in ids)),
                    "resumed": await asyncio.gather(
                        *(run(stub, request(i, model, prefill, alone[i][: 1 + i % (NEW_TOKENS - 1)])) for i in ids)
                    ),
                }.items():
                    for i, (tokens, lost) in zip(ids, results, strict=True):
                        same[how] += tokens == alone[i]
                        preemptions += lost if how == "preempted" else 0
        assert same == dict.fromkeys(same, REQUESTS)
        assert preemptions > 0, "the tight pool was meant to preempt"
        await mesh.wait_quiet()
