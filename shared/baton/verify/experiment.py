"""Ask with and without the injected delay, in turn, and compare what the ledgers say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import grpc

from baton.client import ledger as client_ledger
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from baton.verify.cases import LONG_TOKENS, TOKENS, Case
from baton.verify.estimate import Estimate
from baton.verify.lab import Lab

LIMIT: Final = 0.05
"""Of what was injected, so much may be missing or be found elsewhere."""
_TIMEOUT: Final = 60.0
_SMALL_WINDOW: Final = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
"""A client that takes little at once: when it stops reading, the router notices before a megabyte is on its way."""

Parts = Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one case: medians over its pairs of requests.

    Attributes:
        case: of what.
        injected: what the delay cost the request, seconds: as given, or as the whole request grew.
        share: of it, that is in the right entry.
        strayed: of it, that is in all other entries together; negative: they shrank.
        largest: of it, that is in the one other entry that changed most. Two that change against each other do not hide
            in the sum.
        changes: by how much each entry grew, seconds.
        residual: the largest residual of any of its requests, seconds, absolute.
        pairs: how many.
    """

    case: Case
    injected: float
    share: Estimate
    strayed: Estimate
    largest: Estimate
    changes: Mapping[str, float]
    residual: float
    pairs: int

    @property
    def holds(self) -> bool:
        """All of it in the right entry and nothing elsewhere, to 5 %."""
        return (
            abs(self.share.median - 1) <= LIMIT
            and abs(self.strayed.median) <= LIMIT
            and abs(self.largest.median) <= LIMIT
        )

    @property
    def surely_holds(self) -> bool:
        """It holds, and anywhere in the confidence intervals: more pairs would hardly change that."""
        return (
            self.holds and self.share.surely_within(1 - LIMIT, 1 + LIMIT) and self.strayed.surely_within(-LIMIT, LIMIT)
        )


async def run_case(
    lab: Lab, case: Case, pairs: int, most_pairs: int, on_pair: Callable[[int], None] = lambda pairs: None
) -> Finding:
    """One case, over pairs of requests: one without the delay, one with it.

    Measures `pairs` of them, and where that leaves open whether it holds, more until it surely does, or `most_pairs`.
    """
    rng = random.Random(case.name)
    changes: list[dict[tuple[str, str], float]] = []
    totals: list[float] = []
    residual = 0.0
    async with grpc.aio.insecure_channel(lab.router, options=_SMALL_WINDOW) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for pair in range(most_pairs + 1):
            prompt = [rng.randrange(5, 300) for _ in range(case.prompt_tokens)]
            if case.cached:
                await _ask(stub, case, prompt, stall=0)  # fills the cache
                await asyncio.sleep(0.1)
            # Both after the same rest, and each first in turn: what an idle or a warm machine does hits both alike.
            without, with_it = _changed(prompt, case), prompt
            if pair % 2:
                before, first_residual = await _rested(stub, case, without)
            case.inject(lab)
            try:
                after, second_residual = await _rested(stub, case, with_it, stall=case.stall_seconds)
            finally:
                lab.clear()
            if not pair % 2:
                before, first_residual = await _rested(stub, case, without)
            residual = max(residual, first_residual, second_residual)
            if not pair:
                continue  # it warms up
            changes.append({part: after.get(part, 0) - before.get(part, 0) for part in {*before, *after}})
            totals.append(sum(after.values()) - sum(before.values()))
            on_pair(pair)
            if pair >= pairs and (finding := finding_of(case, changes, totals, residual)).surely_holds:
                return finding
    return finding_of(case, changes, totals, residual)


def finding_of(case: Case, changes: Sequence[Parts], totals: Sequence[float], residual: float) -> Finding:
    """What the pairs say.

    Args:
        case: of what.
        changes: by how much each entry grew, per pair, seconds.
        totals: by how much the whole request grew, per pair, seconds.
        residual: the largest, seconds.
    """
    right = (case.hop, case.kind)
    injected = [total if case.seconds is None else case.seconds for total in totals]
    costs = list(zip(changes, injected, strict=True))
    share = Estimate.of([change.get(right, 0.0) / cost for change, cost in costs])
    strayed = Estimate.of([sum(v for part, v in change.items() if part != right) / cost for change, cost in costs])
    parts = sorted({part for change in changes for part in change})
    others = [Estimate.of([change.get(part, 0.0) / cost for change, cost in costs]) for part in parts if part != right]
    largest = max(others, key=lambda estimate: abs(estimate.median), default=Estimate(0.0, 0.0, 0.0))
    grew = {" ".join(part): median(change.get(part, 0.0) for change in changes) for part in parts}
    return Finding(case, median(injected), share, strayed, largest, grew, residual, len(changes))


def _changed(prompt: list[int], case: Case) -> list[int]:
    """The same length, another prompt from its first token on; where the cache is to hit, the same prompt."""
    return prompt if case.cached else [prompt[0] ^ 1, *prompt[1:]]


async def _rested(
    stub: inference_pb2_grpc.InferenceAsyncStub, case: Case, prompt: list[int], *, stall: float = 0.0
) -> tuple[Parts, float]:
    """As `_ask`, once everything of the request before, delayed as it may be, has arrived."""
    await asyncio.sleep(0.15)
    return await _ask(stub, case, prompt, stall=stall)


async def _ask(
    stub: inference_pb2_grpc.InferenceAsyncStub, case: Case, prompt: list[int], *, stall: float
) -> tuple[Parts, float]:
    """One request: its parts, and its residual; seconds."""
    mode = inference_pb2.CACHE_MODE_USE if case.cached else inference_pb2.CACHE_MODE_BYPASS
    call = stub.StreamGenerate(
        inference_pb2.StreamGenerateRequest(
            token_ids=sampling_pb2.TokenIds(ids=prompt),
            sampling=sampling_pb2.SamplingParams(
                max_tokens=LONG_TOKENS if case.stall_seconds else TOKENS, temperature=0, ignore_eos=True
            ),
            cache_control=inference_pb2.CacheControl(mode=mode),
        ),
        timeout=_TIMEOUT,
    )
    summary = inference_pb2.Summary()
    count = 0
    async for message in call:
        count += 1
        if count == 3 and stall:
            await asyncio.sleep(stall)
        if message.WhichOneof("event") == "summary":
            summary = message.summary
    total = client_ledger.from_proto(summary.ledger).total
    assert total is not None
    parts: dict[tuple[str, str], float] = {}
    for entry in total.entries:
        parts[entry.hop, entry.kind] = parts.get((entry.hop, entry.kind), 0.0) + entry.duration_ns / 1e9
    return parts, abs(total.residual_ns) / 1e9
