"""What steps take is learned from reports, whatever the mix of steps, and follows a machine that changes."""

from __future__ import annotations

import random

import pytest

from baton.engine.messages import StepReport
from baton.internal.v1 import worker_pb2
from baton.worker.step_cost import StepCost
from baton.worker.step_meter import Line, StepMeter

TRUTH = StepCost(0.008, 0.0004, 0.009, 0.0004, 3e-9, 256)


def report(seconds: float, prefill: int = 0, context: int = 0, decodes: int = 0) -> StepReport:
    return StepReport(
        step=1,
        duration_ns=int(seconds * 1e9),
        prefill_tokens=prefill,
        decode_requests=decodes,
        running=decodes,
        waiting=0,
        used_tokens=0,
        free_tokens=0,
        preempted=0,
        attended_pairs=prefill * context + prefill * (prefill + 1) // 2,
    )


def step(prefill: int, context: int, decodes: int, factor: float = 1.0) -> StepReport:
    seconds = TRUTH.prefill(prefill, context, decodes) if prefill else TRUTH.decode(decodes)
    return report(factor * seconds, prefill, context, decodes)


def mixed(rng: random.Random, factor: float = 1.0) -> StepReport:
    noise = factor * rng.uniform(0.9, 1.1)
    decodes = rng.randrange(9)
    if rng.random() < 0.5:
        return step(rng.randrange(16, 248), 256 * rng.randrange(12), decodes, noise)
    return step(0, 0, max(1, decodes), noise)


def warmed() -> StepMeter:
    meter = StepMeter(256)
    for tokens, context in ((16, 0), (16, 0), (256, 0), (256, 256), (16, 512)):
        meter.learn(step(tokens, context, 0))
        for _ in range(7):
            meter.learn(step(0, 0, 1))
    meter.settle()
    return meter


def test_a_warm_up_is_enough_to_begin_with() -> None:
    cost = warmed().cost()
    assert cost is not None
    for tokens in (32, 128, 512, 1024, 2048):
        assert cost.prefill(tokens) == pytest.approx(TRUTH.prefill(tokens), rel=0.1)


def test_learns_from_any_mix_of_steps() -> None:
    meter, rng = warmed(), random.Random(1)
    for _ in range(400):
        meter.learn(mixed(rng))
    cost = meter.cost()
    assert cost is not None
    for tokens, context, running in ((32, 0, 0), (128, 1024, 8), (512, 0, 4), (2048, 0, 8), (2048, 0, 0)):
        assert cost.prefill(tokens, context, running) == pytest.approx(TRUTH.prefill(tokens, context, running), rel=0.1)
    for running in (1, 8):
        assert cost.decode(running) == pytest.approx(TRUTH.decode(running), rel=0.1)


def test_follows_a_machine_that_slows_down() -> None:
    meter, rng = warmed(), random.Random(2)
    for _ in range(300):
        meter.learn(mixed(rng, factor=3.0))
    cost = meter.cost()
    assert cost is not None
    assert cost.prefill(1024, 0, 4) == pytest.approx(3 * TRUTH.prefill(1024, 0, 4), rel=0.1)


def test_an_hour_of_decoding_does_not_make_it_forget_prompts() -> None:
    meter = warmed()
    before = meter.cost()
    for _ in range(5000):
        meter.learn(step(0, 0, 3))
    after = meter.cost()
    assert before is not None
    assert after is not None
    assert after.prefill(1024) == before.prefill(1024)
    assert after.decode(3) == pytest.approx(TRUTH.decode(3), rel=0.02)


def test_one_hiccup_counts_for_little() -> None:
    meter, rng = warmed(), random.Random(3)
    for _ in range(200):
        meter.learn(mixed(rng))
    meter.learn(report(20.0, prefill=64))
    cost = meter.cost()
    assert cost is not None
    assert cost.prefill(512) < 1.5 * TRUTH.prefill(512)


def test_an_idle_report_teaches_nothing_and_nothing_is_known_before_a_prompt() -> None:
    meter = StepMeter(256)
    meter.learn(report(0.0))
    meter.learn(step(0, 0, 4))
    assert meter.cost() is None


def test_no_coefficient_is_negative() -> None:
    line, rng = Line((1.0, 10.0, 100.0)), random.Random(4)
    for _ in range(300):
        at = (1.0, rng.uniform(0, 20), rng.uniform(0, 200))
        line.learn(at, max(0.0, 1.0 + 0.5 * at[1] - 0.01 * at[2] + rng.gauss(0, 0.5)))
        assert min(line.coefficients()) >= 0
    assert line.value((1.0, 10.0, 0.0)) == pytest.approx(5.5, abs=1.5)


def test_costs_survive_the_wire_and_nonsense_does_not() -> None:
    assert StepCost.from_proto(TRUTH.to_proto()) == TRUTH
    for broken in (
        worker_pb2.StepCost(),
        worker_pb2.StepCost(decode_seconds=-1, step_tokens=256),
        worker_pb2.StepCost(prefill_seconds=float("nan"), step_tokens=256),
        worker_pb2.StepCost(seconds_per_token=float("inf"), step_tokens=256),
    ):
        assert StepCost.from_proto(broken) is None
