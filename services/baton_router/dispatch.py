"""Places requests by all this router knows of the workers now, and counts what it chose and why."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter

from baton.internal.v1 import decode_pb2
from baton.worker.digests import BlockDigests
from baton_router.placement import Candidate, Choice, Policy, Prompt, Reason, Strategy, order_prefill, pick_decode
from baton_router.rents import Rents
from baton_router.worker import Worker

PLACEMENTS = Counter(
    "baton_router_placements_total", "Workers chosen for requests, the first prefill choice counts", ["tier", "reason"]
)
EXPECTED_TOKENS = Counter(
    "baton_router_expected_prefix_tokens_total",
    "Prompt tokens expected in prefix caches of the workers that requests were sent to",
)
for _tier in ("decode", "prefill"):
    for _reason in Reason:
        PLACEMENTS.labels(_tier, _reason)

MAX_ANSWER_TOKENS: Final = 256
"""Most tokens an answer is expected to have: what clients allow is mostly far more than what they get."""
_REUSE_REQUESTS: Final = 64
"""What share of prompts is reused is a mean over about so many."""
BLOCK_TOKENS: Final = 16
_BEGINNING_BLOCKS: Final = 16
"""Blocks of BLOCK_TOKENS that stand for a prompt's beginning; all of a shorter one."""
_BEGINNINGS: Final = BlockDigests(b"baton-beginnings")
"""The same in every router, so that equal prompts meet; these digests never leave it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to be placed.

    Attributes:
        fingerprint: of the model.
        token_ids: prompt, and what was delivered of the answer.
        answer_tokens: that may follow.
        salt: whose prefixes it shares; None: nobody's.
    """

    fingerprint: str
    token_ids: Sequence[int]
    answer_tokens: int
    salt: bytes | None

    @property
    def expected_answer(self) -> int:
        """Tokens that are expected to follow."""
        return min(self.answer_tokens, MAX_ANSWER_TOKENS)


class Placed:
    """Where a request goes.

    Attributes:
        decode: runs it.
        candidates: prefill services that may compute its prompt, as decode is told of them.
    """

    def __init__(
        self, ask: Ask, decode: Worker, here: Choice, prefill: Sequence[tuple[Worker, Choice]], policy: Policy
    ) -> None:
        self._ask = ask
        self.decode = decode
        self._here = here
        self._prefill = prefill
        by_hash = policy.strategy is Strategy.HASH
        self.candidates: list[decode_pb2.PrefillCandidate] = [
            worker.prefill_candidate(choice.candidate, fallback=by_hash and i > 0)
            for i, (worker, choice) in enumerate(prefill)
        ]

    @property
    def remote(self) -> bool:
        """Whether decode is expected to have the prompt computed by a prefill worker."""
        return bool(self._prefill) and self._prefill[0][1].seconds < self._here.seconds

    @property
    def expected_cached(self) -> int:
        """Prompt tokens that are expected not to be computed."""
        there = self._prefill[0][1].candidate.cached_tokens if self.remote else 0
        return max(self._here.candidate.cached_tokens, there)

    @contextmanager
    def holding(self) -> Iterator[Callable[[], None]]:
        """The request is there for the length of the block. What is yielded is called when its prompt is computed."""
        tokens = len(self._ask.token_ids)
        with ExitStack() as stack, ExitStack() as computing:
            here = 0 if self.remote else tokens - self._here.candidate.cached_tokens
            sent = stack.enter_context(self.decode.holding(here, tokens + self._ask.expected_answer))
            if self.remote:
                worker, choice = self._prefill[0]
                computing.enter_context(worker.holding(tokens - choice.candidate.cached_tokens, tokens))

            def computed() -> None:
                sent.prompt_tokens = 0
                computing.close()

            yield computed


class Dispatcher:
    """Chooses workers.

    Args:
        policy: how.
        key: of the digests that workers tell their prefixes by.
        workers: those of a tier, as of now.
        rng: for ties.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        policy: Policy,
        key: bytes,
        workers: Callable[[str], Sequence[Worker]],
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._digests = BlockDigests(key)
        self._workers = workers
        self._rng = rng
        self._clock = clock
        self._rents = Rents()
        self._reuse = 0.0

    def place(self, ask: Ask, avoid: Collection[str] = ()) -> Placed | None:
        """Where a request goes; None: no decode worker can take it.

        Args:
            ask: to be placed.
            avoid: incarnations that already failed it.
        """
        chains = Chains(self._digests, ask)
        decode = self._seen("decode", ask, chains, avoid)
        if not decode:
            return None
        prompt = Prompt(len(ask.token_ids), ask.expected_answer, chains.beginning(), self._reuse)
        prefill = self._seen("prefill", ask, chains)
        ordered = self._order([candidate for _, candidate in prefill.values()], prompt, chains)
        remote = ordered[0].seconds if ordered else None
        here = pick_decode(prompt, [candidate for _, candidate in decode.values()], self._policy, self._rng, remote)
        there = [(prefill[choice.candidate.target][0], choice) for choice in ordered]
        placed = Placed(ask, decode[here.candidate.target][0], here, there, self._policy)
        PLACEMENTS.labels("decode", here.reason).inc()
        if there:
            PLACEMENTS.labels("prefill", there[0][1].reason).inc()
        EXPECTED_TOKENS.inc(placed.expected_cached)
        self._reuse += (placed.expected_cached / prompt.tokens - self._reuse) / _REUSE_REQUESTS
        return placed

    def _order(self, candidates: Sequence[Candidate], prompt: Prompt, chains: Chains) -> Sequence[Choice]:
        """Prefill workers in their order; what is waited for a prefix is remembered."""
        now = self._clock()
        blocks = max((candidate.cached_tokens for candidate in candidates), default=0) // BLOCK_TOKENS
        chain = chains.of(BLOCK_TOKENS)
        prefix = chain[min(blocks, len(chain)) - 1] if blocks and chain else 0
        paid = self._rents.paid(prefix, now) if prefix else 0.0
        order = order_prefill(prompt, candidates, self._policy, self._rng, paid)
        if prefix and order.choices[0].reason is Reason.COPY:
            self._rents.settle(prefix)
        elif prefix and order.rent:
            self._rents.pay(prefix, order.rent, now)
        return order.choices

    def expected_cached(self, ask: Ask) -> int:
        """Prompt tokens that some worker is expected to have computed already: less than all of them."""
        chains = Chains(self._digests, ask)
        seen = [*self._seen("decode", ask, chains).values(), *self._seen("prefill", ask, chains).values()]
        most = max((candidate.cached_tokens for _, candidate in seen), default=0)
        return min(most, max(0, len(ask.token_ids) - 1))

    def _seen(
        self, tier: str, ask: Ask, chains: Chains, avoid: Collection[str] = ()
    ) -> dict[str, tuple[Worker, Candidate]]:
        """Workers that may get it, by target."""
        now = self._clock()
        seen = {}
        for worker in self._workers(tier):
            state = worker.state
            if state.draining or state.model.fingerprint != ask.fingerprint or state.incarnation in avoid:
                continue
            prefixes = worker.prefixes
            cached = prefixes.depth(chains.of(prefixes.block_tokens)) * prefixes.block_tokens if len(prefixes) else 0
            seen[worker.target] = worker, worker.candidate(cached, now)
        return seen


class Chains:
    """Digests of a request's blocks, computed when they are asked for."""

    def __init__(self, digests: BlockDigests, ask: Ask) -> None:
        self._digests = digests
        self._ask = ask
        self._chains: dict[int, list[int]] = {}

    def of(self, block_tokens: int) -> list[int]:
        """Of all its whole blocks of so many tokens; empty for one that shares no prefixes."""
        chain = self._chains.get(block_tokens)
        if chain is None:
            salt = self._ask.salt
            chain = [] if salt is None else self._digests.chain(salt, self._ask.token_ids, block_tokens)
            self._chains[block_tokens] = chain
        return chain

    def beginning(self) -> int:
        """Stands for its first tokens; 0: it has too few, or shares nothing."""
        if self._ask.salt is None:
            return 0
        tokens = self._ask.token_ids[: _BEGINNING_BLOCKS * BLOCK_TOKENS]
        chain = _BEGINNINGS.chain(self._ask.salt, tokens, BLOCK_TOKENS)
        return chain[-1] if chain else 0
