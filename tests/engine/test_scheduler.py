"""Slots and blocks are conserved, budgets kept, order respected, and every workload comes to its end.

With and without a prefix cache; with one, whatever a request counts as computed is its own tokens' and nobody else's.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.engine.messages import Role, SamplingParams
from baton.engine.prefix import PrefixIndex, keyed_hash
from baton.engine.request import Request, State
from baton.engine.scheduler import Limits, Plan, Scheduler
from baton.engine.slots import Copy

AGING = 100
JUNK = "what a peer sent and nobody has checked"

Kv = tuple[bytes, tuple[int, ...]] | str | None
"""What a place in the memory holds: the KV of a token is a function of the tokens up to it; and whose it is."""


def a_request(
    sequence: int, tokens: int = 4, role: Role = Role.GENERATE, *, priority: int = 0, now: int = 0, max_tokens: int = 8
) -> Request:
    request = Request.probe([1] * tokens, role, SamplingParams(max_tokens=max_tokens))
    request.request_id, request.sequence = str(sequence), sequence
    request.priority, request.arrival_ns = priority, now
    return request


class World:
    """A scheduler, and the rest of an engine as far as the scheduler sees it: its memory, by what lies there."""

    def __init__(
        self, step_tokens: int, block_tokens: int, capacity_blocks: int, num_slots: int, *, prefix_cache: bool = False
    ) -> None:
        self.limits = Limits(step_tokens, block_tokens, capacity_blocks, AGING)
        prefixes = PrefixIndex(block_tokens, keyed_hash(b"secret")) if prefix_cache else None
        self.scheduler = Scheduler(self.limits, num_slots, prefixes)
        self.kv: list[list[Kv]] = [[None] * (block_tokens * capacity_blocks + 1) for _ in range(num_slots)]
        self.hits = 0
        self.requests: list[Request] = []
        self.now = 0
        self._sequence = 0

    def of(self, *states: State) -> list[Request]:
        return [r for r in self.requests if r.state in states]

    def submit(
        self, tokens: int, role: Role, priority: int, max_tokens: int, alike: int = 99, salt: bytes = b""
    ) -> None:
        """A request of so many tokens, of which all after the first `alike` differ from most others'."""
        room = self.limits.capacity_blocks * self.limits.block_tokens
        tokens = min(tokens, room - 1)
        max_tokens = min(max_tokens, room - tokens)
        self._sequence += 1
        request = a_request(self._sequence, tokens, role, priority=priority, now=self.now, max_tokens=max_tokens)
        request.tokens[alike:] = [2] * len(request.tokens[alike:])
        request.cache_salt = salt
        self.requests.append(request)
        self.scheduler.submit(request)

    def commit(self, request: Request) -> None:
        self.write(request, request.hit, len(request.tokens))
        request.computed = len(request.tokens)
        request.tokens.append(1)
        request.state = State.RUNNING
        self._end_if_complete(request)

    def release(self, request: Request) -> None:
        self.scheduler.free(request)
        self.carry_out()
        self.requests.remove(request)

    def write(self, request: Request, start: int, stop: int) -> None:
        """Its tokens' KV, wherever it is from."""
        for at in range(start, stop):
            self.kv[request.slot][at] = (request.cache_salt, tuple(request.tokens[: at + 1]))

    def check_kv(self, request: Request) -> None:
        """All that counts as computed for it is its own tokens' KV."""
        for at in range(request.computed):
            assert self.kv[request.slot][at] == (request.cache_salt, tuple(request.tokens[: at + 1]))

    def carry_out(self) -> None:
        """What a pool does."""
        for operation in self.scheduler.slots.drain():
            if isinstance(operation, Copy):
                assert operation.tokens % self.limits.block_tokens == 0
                self.kv[operation.target][: operation.tokens] = self.kv[operation.source][: operation.tokens]
                continue
            held = self.kv[operation.slot]
            if not operation.clean:
                held[operation.kept :] = [None] * (len(held) - operation.kept)
            assert JUNK not in held
            assert None not in held[: operation.kept]

    def step(self) -> Plan:
        """Schedule, check the plan, and do what it says."""
        promised = self.scheduler.has_work(self.now)
        before = Before(self)
        plan = self.scheduler.schedule(self.now)
        assert promised == bool(plan.work or plan.admitted or plan.preempted)
        before.check(plan)
        self.carry_out()
        self.check_holdings()
        for request in plan.admitted:
            assert request.hit % self.limits.block_tokens == 0
            assert request.hit < len(request.tokens)
            self.hits += request.hit
            if request.state is State.RESERVED:  # a front writes behind what is there, and may break off
                self.kv[request.slot][request.hit : len(request.tokens)] = [JUNK] * (len(request.tokens) - request.hit)
        for work in plan.work:
            request = work.request
            samples = work.samples
            self.write(request, work.start, work.start + work.count)
            request.computed += work.count
            self.check_kv(request)
            if samples:
                request.proven = request.computed
                self.scheduler.slots.publish(request)
                request.tokens.append(1)
                if request.role is Role.PREFILL:
                    request.state = State.HELD
                else:
                    self._end_if_complete(request)
        return plan

    def check_holdings(self) -> None:
        """What is held adds up."""
        holding, scheduler = self.scheduler.holding, self.scheduler
        assert set(holding) == set(self.of(State.RUNNING, State.RESERVED, State.HELD))
        slots = [r.slot for r in holding]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < scheduler.slots.total for slot in slots)
        assert scheduler.slots.free == scheduler.slots.total - len(slots)
        assert scheduler.slots.used_blocks == sum(r.blocks for r in holding)
        assert scheduler.slots.used_blocks + scheduler.slots.kept_blocks <= self.limits.capacity_blocks
        assert 0 <= scheduler.slots.kept <= scheduler.slots.free
        for request in holding:
            assert request.blocks * self.limits.block_tokens >= len(request.tokens)
            assert 0 <= request.hit <= request.proven <= request.computed <= len(request.tokens)
        for request in self.of(State.WAITING):
            assert (request.slot, request.blocks, request.computed) == (-1, 0, 0)
        assert sorted(r.sequence for r in scheduler.waiting) == sorted(r.sequence for r in self.of(State.WAITING))

    def check_empty(self) -> None:
        assert self.scheduler.slots.free == self.scheduler.slots.total
        assert self.scheduler.slots.used_blocks == 0
        assert self.scheduler.waiting == self.scheduler.holding == []
        assert not self.scheduler.has_work(self.now)

    def urgency(self, request: Request) -> tuple[int, int]:
        return -(request.priority + (self.now - request.arrival_ns) // AGING), request.sequence

    def peak_with(self, newcomer: Request, needed: int) -> int:
        """Blocks that are needed at most if everybody gets as long as expected, token by token."""
        growing = [(needed, newcomer), *((r.blocks, r) for r in self.scheduler.holding)]
        left = [(blocks, self.scheduler.expected_growth(request)) for blocks, request in growing]
        longest = max(tokens for _, tokens in left)
        sizes = [
            sum(blocks + self.limits.blocks(passed) for blocks, tokens in left if tokens >= passed)
            for passed in range(longest + 1)
        ]
        return max(sizes)

    def expect(self, tokens: int) -> None:
        """Answers were so long so far."""
        for _ in range(20):
            request = a_request(0)
            request.tokens += [1] * tokens
            self.scheduler.completed(request)

    def _end_if_complete(self, request: Request) -> None:
        if request.num_generated >= request.sampling.max_tokens:
            self.scheduler.completed(request)
            self.release(request)


class Before:
    """What was so before a step, to judge its plan by."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waiting = world.of(State.WAITING)
        self.running = world.of(State.RUNNING)
        self.decoding = [r for r in self.running if r.pending == 1]
        self.preemptible = [r for r in self.running if r.role is not Role.PREFILL]

    def check(self, plan: Plan) -> None:
        self._check_work(plan)
        self._check_admission(plan)
        self._check_preemption(plan)
        self._check_progress(plan)

    def _check_work(self, plan: Plan) -> None:
        limits = self.world.limits
        assert sum(work.count for work in plan.work) <= limits.step_tokens
        assert plan.prefill_tokens + plan.decode_requests == sum(work.count for work in plan.work)
        working = [work.request for work in plan.work]
        assert len(set(working)) == len(working)
        for work in plan.work:
            assert work.request.state is State.RUNNING
            assert work.start == work.request.computed
            assert 1 <= work.count <= work.request.pending
            assert work.request.blocks * limits.block_tokens >= work.start + work.count
        # A prompt gets its tokens only after everybody who can decode got one.
        chunks = [i for i, work in enumerate(plan.work) if work.count > 1]
        if chunks:
            assert all(r in working[: chunks[0]] or r in plan.preempted for r in self.decoding)

    def _check_admission(self, plan: Plan) -> None:
        urgency, scheduler = self.world.urgency, self.world.scheduler
        assert all(request in self.waiting for request in plan.admitted)
        for request in plan.admitted:
            foreign = request.role is Role.RECEIVE and request.preemptions == 0
            assert request.state is (State.RESERVED if foreign else State.RUNNING)
        left = sorted(scheduler.waiting, key=urgency)
        if left:
            # Nobody overtakes the first that has to wait, however small ...
            assert all(urgency(admitted) < urgency(left[0]) for admitted in plan.admitted)
            # ... and it waits only for want of a slot or of blocks, now or later, or because it just lost them.
            needed = self.world.limits.blocks(len(left[0].tokens) + 1)
            room = self.world.limits.capacity_blocks - scheduler.slots.used_blocks
            later = (
                bool(scheduler.holding) and self.world.peak_with(left[0], needed) > self.world.limits.capacity_blocks
            )
            assert not scheduler.slots.free or needed > room or later or left[0] in plan.preempted

    def _check_preemption(self, plan: Plan) -> None:
        urgency = self.world.urgency
        assert all(victim in self.preemptible for victim in plan.preempted)
        survivors = [r for r in self.preemptible if r not in plan.preempted]
        for victim in plan.preempted:
            assert victim.state is State.WAITING
            assert all(urgency(r) < urgency(victim) for r in survivors)

    def _check_progress(self, plan: Plan) -> None:
        """The most urgent gets its token, unless memory that must not be taken leaves no room for it."""
        first = min(self.preemptible, key=self.world.urgency, default=None)
        if first is None or first.pending != 1 or first is not min(self.decoding, key=self.world.urgency):
            return
        untouchable = sum(
            r.blocks for r in self.world.scheduler.holding if not r.preemptible and r not in plan.admitted
        )
        needed = self.world.limits.blocks(len(first.tokens) + 1)
        if untouchable + needed <= self.world.limits.capacity_blocks:
            assert first in [work.request for work in plan.work]


class AnyOrder(RuleBasedStateMachine):
    """Anything a front can do, in any order."""

    @initialize(
        step_tokens=st.integers(1, 12),
        block_tokens=st.integers(1, 4),
        capacity_blocks=st.integers(2, 12),
        num_slots=st.integers(1, 5),
        prefix_cache=st.booleans(),
    )
    def start(
        self, step_tokens: int, block_tokens: int, capacity_blocks: int, num_slots: int, prefix_cache: bool
    ) -> None:
        self.world = World(step_tokens, block_tokens, capacity_blocks, num_slots, prefix_cache=prefix_cache)

    @rule(
        tokens=st.integers(1, 20),
        role=st.sampled_from(Role),
        priority=st.integers(-2, 2),
        max_tokens=st.integers(1, 12),
        alike=st.sampled_from([99, 99, 12, 6, 1]),
        salt=st.sampled_from([b"", b"", b"another tenant"]),
    )
    def submit(self, tokens: int, role: Role, priority: int, max_tokens: int, alike: int, salt: bytes) -> None:
        self.world.submit(tokens, role, priority, max_tokens, alike, salt)

    @rule(passed=st.integers(0, 3 * AGING), times=st.integers(1, 4))
    def step(self, passed: int, times: int) -> None:
        self.world.now += passed
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.of(State.RESERVED))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.world.commit(data.draw(st.sampled_from(self.world.of(State.RESERVED))))

    @precondition(lambda self: self.world.of(State.RESERVED))
    @rule(data=st.data())
    def compute_here(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.world.of(State.RESERVED))).state = State.RUNNING

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data(), again=st.booleans())
    def free(self, data: st.DataObject, again: bool) -> None:
        request = data.draw(st.sampled_from(self.world.requests))
        self.world.release(request)
        used, slots = self.world.scheduler.slots.used_blocks, self.world.scheduler.slots.free
        if again:
            self.world.scheduler.free(request)
        assert (self.world.scheduler.slots.used_blocks, self.world.scheduler.slots.free) == (used, slots)
        assert request.state is State.FINISHED

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check_holdings()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            for request in list(self.world.requests):
                self.world.release(request)
            self.world.check_empty()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

SUBMITS = st.tuples(st.integers(1, 24), st.sampled_from(Role), st.integers(-3, 3), st.integers(1, 20))


@settings(max_examples=200, deadline=None)
@given(
    submits=st.lists(SUBMITS, min_size=1, max_size=12),
    step_tokens=st.integers(1, 16),
    block_tokens=st.integers(1, 4),
    capacity_blocks=st.integers(2, 14),
    num_slots=st.integers(1, 6),
    prefix_cache=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_workload_ends(
    submits: list[tuple[int, Role, int, int]],
    step_tokens: int,
    block_tokens: int,
    capacity_blocks: int,
    num_slots: int,
    prefix_cache: bool,
    seed: int,
) -> None:
    """However little memory there is: as long as the front commits and releases, everybody finishes."""
    chance = random.Random(seed)
    world = World(step_tokens, block_tokens, capacity_blocks, num_slots, prefix_cache=prefix_cache)
    waiting = list(submits)
    for _ in range(5000):
        if waiting and chance.random() < 0.3:
            world.submit(*waiting.pop())
        busy = world.scheduler.has_work(world.now)
        world.step()
        world.now += chance.randrange(AGING)
        outside = world.of(State.RESERVED, State.HELD)
        assert busy or outside or waiting or not world.requests, "stuck: nothing to do, nobody to wait for"
        for request in outside:
            if chance.random() < 0.3:
                (world.commit if request.state is State.RESERVED else world.release)(request)
        if not waiting and not world.requests:
            world.check_empty()
            return
    raise AssertionError("livelock")


def test_nobody_is_let_in_whom_there_will_be_no_memory_for() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=12, num_slots=4)
    world.submit(4, Role.GENERATE, 0, 8)
    world.submit(4, Role.GENERATE, 0, 8)
    first, second = world.requests
    for _ in range(30):
        plan = world.step()
        assert not plan.preempted
        assert second.state is not State.RUNNING or first.state is State.FINISHED
    assert first.num_generated == second.num_generated == 8
    world.check_empty()


def test_who_ends_before_others_grow_makes_room_for_them() -> None:
    """Together they would have 18 blocks at their ends; but they end one after the other."""
    world = World(step_tokens=16, block_tokens=1, capacity_blocks=12, num_slots=4)
    world.submit(4, Role.GENERATE, 0, 2)
    world.submit(4, Role.GENERATE, 0, 8)
    assert len(world.step().admitted) == 2
    assert not any(world.step().preempted for _ in range(20))
    world.check_empty()


def test_scarce_memory_preempts_the_least_urgent_and_both_finish() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=12, num_slots=4)
    world.expect(1)  # wrongly
    world.submit(4, Role.GENERATE, 0, 8)
    world.submit(4, Role.GENERATE, 0, 8)
    first, second = world.requests
    preempted = [r for _ in range(40) for r in world.step().preempted]
    assert set(preempted) == {second}
    assert first.num_generated == second.num_generated == 8
    world.check_empty()


def test_memory_in_use_outside_the_engine_is_never_taken() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=12, num_slots=4)
    world.submit(3, Role.PREFILL, -9, 8)
    world.submit(2, Role.RECEIVE, -9, 8)
    world.step()
    held, reserved = world.requests
    world.submit(3, Role.GENERATE, 9, 8)
    urgent = world.requests[-1]
    for _ in range(20):
        world.step()
    assert (held.state, reserved.state) == (State.HELD, State.RESERVED)
    assert urgent.state is State.WAITING
    assert not world.scheduler.has_work(world.now)
    world.release(held)
    world.release(reserved)
    for _ in range(20):
        world.step()
    assert urgent.num_generated == 8


def test_a_preempted_receiver_computes_its_prompt_itself() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=12, num_slots=4)
    world.expect(1)
    world.submit(4, Role.GENERATE, 0, 8)
    world.submit(4, Role.RECEIVE, 0, 8)
    receiver = world.requests[1]
    world.step()
    world.commit(receiver)
    states = []
    for _ in range(40):
        world.step()
        states.append(receiver.state)
    assert receiver.preemptions > 0
    assert State.RESERVED not in states
    assert receiver.num_generated == 8


def test_head_of_line_is_not_overtaken_for_memory() -> None:
    world = World(step_tokens=16, block_tokens=1, capacity_blocks=10, num_slots=4)
    world.submit(5, Role.PREFILL, 0, 1)
    world.submit(8, Role.GENERATE, 0, 1)
    world.submit(1, Role.GENERATE, 0, 1)
    _, large, small = world.requests
    for _ in range(5):
        assert large not in world.step().admitted
    assert small.state is State.WAITING


def test_waiting_raises_a_low_priority() -> None:
    """With one slot and a stream of requests of priority 3, one of priority 0 gets its turn after 3 aging periods."""
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=10, num_slots=1)
    world.submit(1, Role.GENERATE, 0, 1)
    patient = world.requests[0]
    rounds = 0
    while patient.state is State.WAITING:
        world.submit(1, Role.GENERATE, 3, 1)
        world.step()
        if patient.state is State.WAITING:
            world.now += AGING // 4
            rounds += 1
        assert rounds < 50
    assert rounds == 3 * 4


def test_priority_decides_who_is_admitted_first() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=10, num_slots=2)
    for priority in (0, 2, 1):
        world.submit(1, Role.GENERATE, priority, 1)
    assert [r.priority for r in world.step().admitted] == [2, 1]


def test_the_lowest_free_slot_is_taken() -> None:
    world = World(step_tokens=8, block_tokens=1, capacity_blocks=100, num_slots=5)
    for _ in range(4):
        world.submit(1, Role.PREFILL, 0, 1)
    world.step()
    assert [r.slot for r in world.requests] == [0, 1, 2, 3]
    for request in (world.requests[0], world.requests[2]):
        world.release(request)
    for _ in range(3):
        world.submit(1, Role.PREFILL, 0, 1)
    world.step()
    assert [r.slot for r in world.requests[-3:]] == [0, 2, 4]


# --------------------------------------------------------------------------------------- prefix cache


def served(world: World, tokens: int, role: Role = Role.GENERATE, alike: int = 99, salt: bytes = b"") -> Request:
    """A request from its arrival to its end."""
    world.submit(tokens, role, 0, 1, alike, salt)
    request = world.requests[-1]
    hit = world.hits
    world.step()
    request.hit = world.hits - hit  # for the test to see: a request that ended holds nothing
    if request.state is not State.FINISHED:
        world.release(request)
    return request


def a_cache(capacity_blocks: int = 100, num_slots: int = 4) -> World:
    return World(64, 4, capacity_blocks, num_slots, prefix_cache=True)


def test_the_longest_prefix_is_found_in_whole_blocks_and_one_token_left() -> None:
    world = a_cache()
    assert served(world, 16).hit == 0
    assert served(world, 16).hit == 12
    assert served(world, 17).hit == 16
    assert served(world, 40).hit == 16
    assert served(world, 40, alike=22).hit == 20
    assert served(world, 40, alike=3).hit == 0
    assert served(world, 3).hit == 0


def test_salts_share_nothing() -> None:
    world = a_cache()
    served(world, 16, salt=b"one")
    assert served(world, 17, salt=b"two").hit == 0
    assert served(world, 17).hit == 0
    assert served(world, 17, salt=b"one").hit == 16


def test_who_opts_out_neither_finds_nor_leaves() -> None:
    world = a_cache()
    served(world, 16)
    for _ in range(2):
        world.submit(17, Role.PREFILL, 0, 1, 5)
        world.requests[-1].prefix_cache = False
        world.step()
        assert world.requests[-1].hit == 0
        world.release(world.requests[-1])
    assert world.scheduler.slots.kept == 1
    assert served(world, 17, alike=5).hit == 4


def test_a_request_takes_over_the_slot_that_it_mostly_shares_and_copies_from_others() -> None:
    world = a_cache()
    first = served(world, 40, Role.PREFILL)
    world.submit(44, Role.PREFILL, 0, 1)  # goes on where it stopped
    world.submit(44, Role.PREFILL, 0, 1)  # while that one works in the slot
    world.step()
    second, third = world.requests
    assert (second.slot, second.hit, first.slot) == (0, 40, -1)
    assert (third.slot, third.hit) == (1, 40)
    world.release(second)
    world.release(third)
    world.submit(44, Role.PREFILL, 0, 1, alike=8)  # shares little: what is there stays
    world.step()
    (fourth,) = world.requests
    assert fourth.hit == 8
    world.release(fourth)
    assert world.scheduler.slots.kept == 2
    assert served(world, 50).hit == 44


def test_what_is_kept_never_keeps_anybody_waiting() -> None:
    """The least recently used goes first, for want of blocks or of slots."""
    world = a_cache(capacity_blocks=12, num_slots=3)
    for salt in (b"a", b"b", b"c"):
        served(world, 15, salt=salt)
    assert (world.scheduler.slots.kept, world.scheduler.slots.kept_blocks) == (3, 9)
    served(world, 16, salt=b"a")
    world.submit(24, Role.PREFILL, 0, 1, salt=b"d")
    assert world.step().admitted  # seven blocks of twelve, in a slot that somebody's prefix was in
    world.release(world.requests[0])
    assert served(world, 16, salt=b"b").hit == 0
    world.submit(46, Role.PREFILL, 0, 1, salt=b"e")
    assert world.step().admitted  # all there is
    assert world.scheduler.slots.kept == 0
    world.release(world.requests[0])
    assert world.scheduler.slots.kept_blocks == 11


def test_what_a_free_slot_holds_is_not_kept_twice() -> None:
    world = a_cache()
    for _ in range(3):
        world.submit(16, Role.PREFILL, 0, 1)
    world.step()
    world.submit(24, Role.PREFILL, 0, 1)
    world.step()
    for request in list(world.requests):
        world.release(request)
    assert (world.scheduler.slots.kept, world.scheduler.slots.kept_blocks) == (1, 6)


def test_a_preempted_request_finds_again_what_nobody_needed() -> None:
    world = World(step_tokens=16, block_tokens=1, capacity_blocks=14, num_slots=2, prefix_cache=True)
    world.expect(1)
    world.submit(4, Role.GENERATE, 1, 6)
    world.submit(4, Role.GENERATE, 0, 9, alike=0)
    _, victim = world.requests
    while not victim.preemptions:
        world.step()
    while victim.state is State.WAITING:
        world.step()
    assert victim.hit > 0
