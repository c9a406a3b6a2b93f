"""A decode and a prefill worker on a clock that only counts: engines take the time their cost says, nothing is random
but by a seed. What decides is the service's own code; its view of the prefill worker is as old as a router's.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.engine.messages import StepReport
from baton.internal.v1 import decode_pb2, timing_pb2
from baton.v1 import ledger_pb2
from baton.worker.step_cost import StepCost
from baton.worker.step_meter import StepMeter
from baton_decode.placement import HERE, Policy, PrefillPlacement, Prompt
from baton_decode.placer import Placer

BYTES_PER_TOKEN = 25_000


@dataclass(frozen=True)
class Scene:
    """What is simulated.

    Attributes:
        tokens: of every prompt.
        streams: that run in decode all the time.
        load: prompt work that arrives, as a share of what the decode worker alone could compute.
        decode, prefill: the truth about the two engines.
        overhead: seconds to ask and to answer, together.
        seconds_per_byte: of the link.
        stale: seconds between two looks at the prefill worker.
        noise: steps take up to this share more or less.
        requests: that arrive.
    """

    tokens: int
    streams: int
    load: float
    decode: StepCost
    prefill: StepCost
    overhead: float = 0.004
    seconds_per_byte: float = 1e-9
    stale: float = 0.1
    noise: float = 0.1
    requests: int = 80


class Clock:
    """Runs what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), do))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now, _, do = heapq.heappop(self._due)
            do()


@dataclass
class Job:
    """A prompt in an engine."""

    left: int
    done: Callable[[float, float], None]
    """Called with its seconds of queueing and computing."""
    since: float
    computed: int = 0
    began: float | None = None


@dataclass
class Engine:
    """Steps as the real one schedules them: every stream first, then prompts in order of arrival."""

    clock: Clock
    cost: StepCost
    meter: StepMeter
    rng: random.Random
    noise: float
    on_report: Callable[[StepReport], None] = lambda report: None
    streams: list[int] = field(default_factory=list)
    """Tokens each still wants."""
    jobs: deque[Job] = field(default_factory=deque)
    inbox: list[Job] = field(default_factory=list)
    """Not seen before the next step."""
    stepping: bool = False

    @property
    def waiting(self) -> int:
        return sum(job.left for job in self.jobs)

    def submit(self, tokens: int, done: Callable[[float, float], None]) -> None:
        self.inbox.append(Job(tokens, done, self.clock.now))
        self.go_on()

    def stream(self, tokens: int) -> None:
        self.streams.append(tokens)
        self.go_on()

    def go_on(self) -> None:
        if not self.stepping and (self.streams or self.jobs or self.inbox):
            self.stepping = True
            self._step()

    def _step(self) -> None:
        self.jobs.extend(self.inbox)
        self.inbox.clear()
        decodes = len(self.streams)
        budget, chunks = self.cost.step_tokens - decodes, list[tuple[Job, int]]()
        for job in self.jobs:
            if (count := min(job.left, budget)) > 0:
                chunks.append((job, count))
                budget -= count
                job.began = self.clock.now if job.began is None else job.began
        tokens = sum(count for _, count in chunks)
        pairs = sum(count * job.computed + count * (count + 1) // 2 for job, count in chunks)
        seconds = decodes * self.cost.seconds_per_decode
        if tokens:
            seconds += self.cost.prefill_seconds + tokens * self.cost.seconds_per_token
            seconds += pairs * self.cost.seconds_per_pair
        else:
            seconds += self.cost.decode_seconds
        seconds *= self.rng.uniform(1 - self.noise, 1 + self.noise)
        self.clock.after(seconds, lambda: self._stepped(seconds, chunks, decodes, pairs))

    def _stepped(self, seconds: float, chunks: list[tuple[Job, int]], decodes: int, pairs: int) -> None:
        for job, count in chunks:
            job.left -= count
            job.computed += count
        self._report(seconds, sum(count for _, count in chunks), decodes, pairs)
        self.streams = [left - (i < decodes) for i, left in enumerate(self.streams)]
        self.streams = [left for left in self.streams if left]
        while self.jobs and not self.jobs[0].left:
            job = self.jobs.popleft()
            assert job.began is not None
            job.done(job.began - job.since, self.clock.now - job.began)
        self.stepping = bool(self.streams or self.jobs or self.inbox)
        if self.stepping:
            self._step()
        else:
            self._report(0.0, 0, 0, 0)

    def _report(self, seconds: float, tokens: int, decodes: int, pairs: int) -> None:
        report = StepReport(
            step=0, duration_ns=int(seconds * 1e9), prefill_tokens=tokens, decode_requests=decodes,
            running=len(self.streams), waiting=0, used_tokens=0, free_tokens=0, preempted=0, attended_pairs=pairs,
            waiting_prompt_tokens=self.waiting,
        )  # fmt: skip
        self.meter.learn(report)
        self.on_report(report)


def first_tokens(scene: Scene, mode: PrefillPlacement, seed: int = 0) -> list[float]:
    """Seconds to the first token of every request, in order of arrival."""
    clock, arrivals = Clock(), random.Random(seed)
    engines = [
        Engine(clock, cost, StepMeter(cost.step_tokens), random.Random(f"{seed} {name}"), scene.noise)
        for name, cost in (("decode", scene.decode), ("prefill", scene.prefill))
    ]
    decode, prefill = engines
    for engine in engines:  # the services' warm-up
        for tokens in (16, 2 * engine.cost.step_tokens + 16):
            engine.submit(tokens, lambda queue, compute: None)
            clock.run(lambda engine=engine: not engine.stepping)  # type: ignore[misc]
            engine.stream(7)
            clock.run(lambda engine=engine: not engine.stepping)  # type: ignore[misc]
        engine.meter.settle()
    placer = Placer(mode, 64, Policy(), decode.meter, BYTES_PER_TOKEN, lambda: clock.now)
    decode.on_report = placer.reported
    for _ in range(scene.streams):
        decode.stream(10**9)
    seen = decode_pb2.PrefillCandidate()

    looked = 0.0

    def look() -> None:
        cost = prefill.meter.cost()
        assert cost is not None
        seen.CopyFrom(
            decode_pb2.PrefillCandidate(target="p:1", waiting_prompt_tokens=prefill.waiting, step_cost=cost.to_proto())
        )
        nonlocal looked
        looked = clock.now
        clock.after(scene.stale, look)

    look()
    waited: dict[int, float] = {}

    def arrive(number: int) -> None:
        began = clock.now
        prompt = Prompt(scene.tokens)
        seen.age_ms = int((clock.now - looked) * 1000)
        decision = placer.decide(prompt, [seen])

        def first_token() -> None:
            waited[number] = clock.now - began

        if decision.target == HERE:
            placer.computing_here(decision)

            def computed_here(queue: float, compute: float) -> None:
                first_token()
                placer.ended_here(decision, clock.now)
                decode.stream(16)

            decode.submit(scene.tokens, computed_here)
            return
        stack = ExitStack()
        asking = stack.enter_context(placer.asking(decision))

        def computed_there(queue: float, compute: float) -> None:
            timing = timing_pb2.HopTiming(
                entries=[
                    timing_pb2.TimingEntry(hop=ledger_pb2.HOP_PREFILL, kind=kind, duration_ns=int(seconds * 1e9))
                    for kind, seconds in ((ledger_pb2.KIND_QUEUE, queue), (ledger_pb2.KIND_COMPUTE, compute))
                ]
            )
            size = scene.tokens * BYTES_PER_TOKEN

            def told() -> None:
                first_token()
                asking.first_token(timing)
                # All but what the link did not manage meanwhile came before.
                exposed = max(0.0, size * scene.seconds_per_byte - compute)
                clock.after(exposed, moved)

            def moved() -> None:
                asking.moved(size, int(size * scene.seconds_per_byte * 1e9))
                stack.close()
                decode.stream(16)

            clock.after(scene.overhead / 2, told)

        clock.after(scene.overhead / 2, lambda: prefill.submit(scene.tokens, computed_there))

    at = 0.1
    between = scene.decode.prefill(scene.tokens, 0, scene.streams) / scene.load
    for number in range(scene.requests):
        at += arrivals.expovariate(1 / between)
        clock.after(at, lambda number=number: arrive(number))  # type: ignore[misc]
    clock.run(lambda: len(waited) == scene.requests)
    return [waited[number] for number in range(scene.requests)]
