"""Prefill workers behind a router on a clock that only counts. What places is the router's own code, and its view of
the workers is as old as a real one's; workers take the time their cost says and keep prefixes as the engine's slots do.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from baton.internal.v1 import worker_pb2
from baton.worker.digests import BlockDigests
from baton.worker.step_cost import StepCost
from baton_router.dispatch import BLOCK_TOKENS, Ask, Dispatcher
from baton_router.placement import Policy
from baton_router.worker import Worker

COST = StepCost(0.008, 0.0002, 0.004, 0.0001, 2e-9, 512)
KEY = b"the router's key"


@dataclass(frozen=True)
class Scene:
    """What is simulated.

    Attributes:
        prefixes: different ones, asked for by a Zipf law of this exponent; 0: every prompt is another.
        zipf: the exponent; 0: all as often.
        prefix_tokens: of each.
        tail_tokens: of each prompt's own.
        kept: prompts that fit into a worker's prefix cache.
        load: arriving work without any hit, as a share of what the workers can compute.
        burst: requests that come at once, for the same prefix.
        workers: how many.
        slots: requests a worker admits at once; whether a prefix is there is decided then.
        stale: seconds between two words of a worker.
        requests: that arrive.
    """

    prefixes: int
    kept: int
    load: float
    zipf: float = 1.0
    prefix_tokens: int = 1536
    tail_tokens: int = 96
    burst: int = 1
    workers: int = 8
    slots: int = 8
    stale: float = 0.1
    requests: int = 1500


@dataclass(eq=False)
class Request:
    """A prompt on its way."""

    arrived: float
    ask: Ask
    chain: list[int]
    first_token: Callable[[], None] = lambda: None
    missing: int = 0
    waited: float = 0.0


class Clock:
    """Runs what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), do))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now, _, do = heapq.heappop(self._due)
            do()


class Engine:
    """Computes prompts one after the other; a prompt's prefix is looked up when it gets a slot."""

    def __init__(self, clock: Clock, scene: Scene, number: int) -> None:
        self._clock = clock
        self._scene = scene
        self._waiting: deque[Request] = deque()
        self._admitted: deque[Request] = deque()
        self._kept: OrderedDict[int, list[int]] = OrderedDict()
        self._numbers = itertools.count()
        self._blocks: Counter[int] = Counter()
        self._told: set[int] = set()
        self._sequence = 0
        self._until = 0.0
        self.hit_tokens = 0
        self.seen = Worker(f"{number}:1", "m", self._state(), 0.0)

    def submit(self, request: Request) -> None:
        request.missing = len(request.ask.token_ids)
        self._waiting.append(request)
        self._admit()
        if len(self._admitted) == 1:
            self._compute()

    def tell(self) -> None:
        """Its word to the router."""
        state = self._state()
        blocks = {block for block, count in self._blocks.items() if count}
        self._sequence += 1
        self.seen.take(state, self._clock.now)
        self.seen.prefixes.take(
            worker_pb2.PrefixChanges(
                sequence=self._sequence,
                snapshot=self._sequence == 1,
                block_tokens=BLOCK_TOKENS,
                added=blocks - self._told,
                removed=self._told - blocks,
            ),
            10**9,
        )
        self._told = blocks

    def _state(self) -> worker_pb2.WatchResponse:
        waiting = sum(request.missing for request in [*self._admitted, *self._waiting])
        if self._admitted:  # of the one that is computed, a part is done
            per_token = COST.seconds_per_token + COST.prefill_seconds / COST.step_tokens
            waiting += int(max(0.0, self._until - self._clock.now) / per_token) - self._admitted[0].missing
        return worker_pb2.WatchResponse(
            incarnation="1",
            model=worker_pb2.WorkerModel(fingerprint="m"),
            capacity=worker_pb2.Capacity(kv_tokens=10**9, slots=10**6),
            load=worker_pb2.Load(
                running=len(self._admitted), waiting_prompt_tokens=max(0, waiting), step_cost=COST.to_proto()
            ),
        )

    def _admit(self) -> None:
        while self._waiting and len(self._admitted) < self._scene.slots:
            request = self._waiting.popleft()
            depth = next((i for i, block in enumerate(request.chain) if not self._blocks[block]), len(request.chain))
            cached = min(depth * BLOCK_TOKENS, len(request.ask.token_ids) - 1)
            self.hit_tokens += cached
            request.missing -= cached
            for number, chain in self._kept.items():
                if depth and chain[:depth] == request.chain[:depth]:
                    self._kept.move_to_end(number)
                    break
            self._admitted.append(request)

    def _compute(self) -> None:
        request = self._admitted[0]
        tokens = len(request.ask.token_ids)
        self._until = self._clock.now + COST.prefill(request.missing, tokens - request.missing)
        self._clock.at(self._until, self._computed)

    def _computed(self) -> None:
        request = self._admitted.popleft()
        request.waited = self._clock.now - request.arrived
        request.first_token()
        self._keep(request.chain)
        self._admit()
        if self._admitted:
            self._compute()

    def _keep(self, chain: list[int]) -> None:
        for number, other in self._kept.items():
            shared = next((i for i, (a, b) in enumerate(zip(chain, other, strict=False)) if a != b), len(other))
            if shared >= 7 / 8 * len(other):
                self._blocks.subtract(self._kept.pop(number))
                break
        self._kept[next(self._numbers)] = chain
        self._blocks.update(chain)
        while len(self._kept) > self._scene.kept:
            self._blocks.subtract(self._kept.popitem(last=False)[1])


@dataclass(frozen=True)
class Outcome:
    """Seconds to first tokens, and the share of prompt tokens that were in a cache."""

    waited: list[float]
    hit_share: float

    def percentile(self, share: float) -> float:
        return sorted(self.waited)[int(share * (len(self.waited) - 1))]


def run(scene: Scene, policy: Policy, seed: int = 0, routers: int = 1) -> Outcome:
    """All requests of a scene, the first third not counted: caches are empty then."""
    clock, rng = Clock(), random.Random(seed)
    engines = [Engine(clock, scene, number) for number in range(scene.workers)]
    decode = Worker("d:1", "m", _roomy(), 0.0)
    # Each router has a ledger of its own: with several, only the workers' words tell of the others.
    tiers = [[engine.seen if routers == 1 else _copy(engine) for engine in engines] for _ in range(routers)]
    dispatchers = [
        Dispatcher(
            policy,
            KEY,
            {"decode": [decode], "prefill": workers}.__getitem__,
            random.Random(f"{seed} {i}"),
            lambda: clock.now,
        )
        for i, workers in enumerate(tiers)
    ]
    by_target = {engine.seen.target: engine for engine in engines}

    def tell(number: int) -> None:
        engine = engines[number]
        engine.tell()
        for workers in tiers if routers > 1 else []:
            workers[number].take(engine.seen.state, clock.now)
            workers[number].prefixes = engine.seen.prefixes
        clock.at(clock.now + scene.stale, lambda: tell(number))

    for number in range(scene.workers):
        clock.at(scene.stale * number / scene.workers, lambda number=number: tell(number))  # type: ignore[misc]

    requests = _requests(scene, rng)
    done: list[Request] = []

    def arrive(request: Request) -> None:
        placed = rng.choice(dispatchers).place(request.ask)
        assert placed is not None
        stack = ExitStack()
        stack.enter_context(placed.holding())

        def first_token() -> None:
            stack.close()
            done.append(request)

        request.first_token = first_token
        by_target[placed.candidates[0].target].submit(request)

    for request in requests:
        clock.at(request.arrived, lambda request=request: arrive(request))  # type: ignore[misc]
    clock.run(lambda: len(done) == len(requests))
    counted = requests[len(requests) // 3 :]
    total = sum(len(request.ask.token_ids) for request in requests)
    return Outcome([request.waited for request in counted], sum(e.hit_tokens for e in engines) / total)


def _requests(scene: Scene, rng: random.Random) -> list[Request]:
    digests = BlockDigests(KEY)
    numbers = itertools.count(1)
    prefixes = [_tokens(next(numbers), scene.prefix_tokens) for _ in range(scene.prefixes)]
    weights = [1 / (i + 1) ** scene.zipf for i in range(scene.prefixes)]
    service = COST.prefill(scene.prefix_tokens + scene.tail_tokens)
    between = service * scene.burst / (scene.load * scene.workers)
    now, requests = 1.0, list[Request]()
    while len(requests) < scene.requests:
        now += rng.expovariate(1 / between)
        prefix = rng.choices(prefixes, weights)[0] if prefixes else None
        if prefixes and len(requests) < scene.requests // 3:  # not counted: every prefix once, as far as that goes
            prefix = prefixes[len(requests) // scene.burst % len(prefixes)]
        for _ in range(scene.burst):
            begin = prefix if prefix is not None else _tokens(next(numbers), scene.prefix_tokens)
            tokens = [*begin, *_tokens(next(numbers), scene.tail_tokens)]
            ask = Ask(fingerprint="m", token_ids=tokens, answer_tokens=1, salt=b"")
            requests.append(Request(now, ask, digests.chain(b"", tokens, BLOCK_TOKENS)))
    return requests


def _tokens(number: int, count: int) -> list[int]:
    """Tokens that begin like no others."""
    return [number, *range(count - 1)]


def _roomy() -> worker_pb2.WatchResponse:
    """A decode worker that would compute prompts slower than anybody."""
    slow = StepCost(1.0, 0.0, 100.0, 1.0, 0.0, 512)
    return worker_pb2.WatchResponse(
        incarnation="1",
        model=worker_pb2.WorkerModel(fingerprint="m"),
        capacity=worker_pb2.Capacity(kv_tokens=10**9, slots=10**6),
        load=worker_pb2.Load(step_cost=slow.to_proto()),
    )


def _copy(engine: Engine) -> Worker:
    return Worker(engine.seen.target, "m", engine.seen.state, 0.0)


SCENES: dict[str, Scene] = {
    "prefixes fit": Scene(prefixes=64, kept=16, load=1.4),
    "some fit": Scene(prefixes=200, kept=8, load=0.85),
    "few prefixes": Scene(prefixes=8, kept=16, load=3.0),
    "few prefixes, quiet": Scene(prefixes=8, kept=16, load=0.85),
    "hardly any fits": Scene(prefixes=2000, kept=4, load=0.7, zipf=0.3),
    "unique prompts": Scene(prefixes=0, kept=16, load=0.7, prefix_tokens=800, tail_tokens=100),
    "bursts": Scene(prefixes=64, kept=16, load=0.6, burst=16),
    "unique bursts": Scene(prefixes=0, kept=16, load=0.5, burst=16, prefix_tokens=800, tail_tokens=100),
    "idle": Scene(prefixes=16, kept=16, load=0.1, requests=400),
    "short prompts": Scene(prefixes=64, kept=16, load=0.7, prefix_tokens=48, tail_tokens=16),
}


def table(policies: dict[str, Policy], seeds: Sequence[int], routers: int = 1) -> dict[str, dict[str, list[Outcome]]]:
    """Scene -> policy -> outcomes."""
    return {
        name: {kind: [run(scene, policy, seed, routers) for seed in seeds] for kind, policy in policies.items()}
        for name, scene in SCENES.items()
    }
