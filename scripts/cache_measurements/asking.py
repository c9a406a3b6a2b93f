"""One request to a router, and what its client saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2, sampling_pb2

USE: Final = inference_pb2.CACHE_MODE_USE
BYPASS: Final = inference_pb2.CACHE_MODE_BYPASS
ONLY: Final = inference_pb2.CACHE_MODE_ONLY
HIT: Final = inference_pb2.CACHE_STATUS_HIT
COALESCED: Final = inference_pb2.CACHE_STATUS_COALESCED

TIMEOUT: Final = 120.0
"""Seconds; a request that takes longer has failed."""
_FIRST_ID: Final = 16
_VOCABULARY: Final = 2048
"""Of the bundled model; ids below the first are special tokens."""

Prompt = tuple[int, ...]
Stub: TypeAlias = "inference_pb2_grpc.InferenceAsyncStub"


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are of this process's monotonic clock, nanoseconds."""

    sent_ns: int
    first_ns: int = 0
    """When the first message with tokens was received; 0: never."""
    done_ns: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    summary: inference_pb2.Summary = field(default_factory=inference_pb2.Summary)
    code: str = "OK"

    @property
    def ok(self) -> bool:
        """It ended well."""
        return self.code == "OK"

    @property
    def ttft_ms(self) -> float:
        """Request sent to first token message received."""
        return (self.first_ns - self.sent_ns) / 1e6

    @property
    def status(self) -> inference_pb2.CacheStatus.ValueType:
        """What the cache did."""
        return self.summary.cache_status

    def first_token_ms(self) -> dict[str, float]:
        """The router's ledger up to the first token: milliseconds by "hop kind"."""
        return parts_ms(self.summary.ledger.first_token)

    def compute_seconds(self) -> float:
        """Seconds it was in a forward or in sampling, on either engine tier."""
        return sum(
            entry.duration.ToNanoseconds() / 1e9
            for entry in self.summary.ledger.total.entries
            if entry.kind == ledger_pb2.KIND_COMPUTE
        )


def parts_ms(partition: ledger_pb2.Partition) -> dict[str, float]:
    """Milliseconds by "hop kind"."""
    parts: dict[str, float] = {}
    for entry in partition.entries:
        hop = ledger_pb2.Hop.Name(entry.hop).removeprefix("HOP_").lower()
        kind = ledger_pb2.Kind.Name(entry.kind).removeprefix("KIND_").lower()
        parts[f"{hop} {kind}"] = parts.get(f"{hop} {kind}", 0.0) + entry.duration.ToNanoseconds() / 1e6
    return parts


def prompts(count: int, lengths: tuple[int, int], rng: random.Random) -> list[Prompt]:
    """So many different prompts of random tokens, each as long as drawn from a range."""
    drawn: dict[Prompt, None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.randrange(_FIRST_ID, _VOCABULARY) for _ in range(rng.randint(*lengths)))] = None
    return list(drawn)


async def ask(
    stub: Stub,
    prompt: Sequence[int],
    max_tokens: int,
    mode: inference_pb2.CacheMode.ValueType = USE,
    on_first: Callable[[], Awaitable[None]] | None = None,
) -> Answer:
    """Ask for a greedy answer of exactly so many tokens. A failure is an answer with its code.

    Args:
        stub: the router's.
        prompt: token ids.
        max_tokens: length of the answer.
        mode: how the cache is used.
        on_first: awaited when the first token is here.
    """
    request = inference_pb2.StreamGenerateRequest(
        token_ids=sampling_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        cache_control=inference_pb2.CacheControl(mode=mode),
    )
    clock = time.monotonic_ns
    answer = Answer(clock())
    try:
        async for message in stub.StreamGenerate(request, timeout=TIMEOUT):
            event = message.WhichOneof("event")
            if event == "chunk" and message.chunk.token_ids:
                if not answer.first_ns:
                    answer.first_ns = clock()
                    if on_first is not None:
                        await on_first()
                answer.token_ids += message.chunk.token_ids
                answer.text += message.chunk.text
            elif event == "summary":
                answer.summary = message.summary
    except grpc.aio.AioRpcError as error:
        answer.code = error.code().name
    answer.done_ns = clock()
    return answer


async def at_once(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run calls concurrently, to the end of the last; the first error cancels the others."""
    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(call)
