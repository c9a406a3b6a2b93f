"""Where a prompt is computed: what the choice promises, whatever the figures."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from baton.worker.step_cost import StepCost
from baton_decode.placement import HERE, Estimate, Here, Policy, Prompt, There, choose, here, there

COST = StepCost(0.008, 0.0004, 0.009, 0.0004, 3e-9, 256)
POLICY = Policy()


def anything(rng: random.Random) -> tuple[Prompt, Here, There, Policy]:
    def cost() -> StepCost:
        factor = 10 ** rng.uniform(-1, 1)
        return StepCost(
            0.008 * factor, 0.0004 * factor, 0.009 * factor, 0.0004 * factor, 3e-9 * factor, rng.choice((32, 256))
        )

    return (
        Prompt(rng.randrange(1, 4096), rng.randrange(0, 4096)),
        Here(cost(), rng.uniform(0, 0.1), rng.randrange(0, 4096), rng.randrange(0, 16)),
        There(
            "p:1",
            cost(),
            rng.uniform(0, 2) * rng.randrange(2),
            rng.uniform(0, 0.02),
            rng.uniform(0, 1e-4),
        ),
        Policy(rng.choice((0.0, 1.0, 3.0)), rng.choice((0.0, 0.05, 0.5))),
    )


def target(prompt: Prompt, local: Here, remote: There, policy: Policy = POLICY) -> str:
    return choose([here(prompt, local), there(prompt, remote)], policy).target


@pytest.mark.parametrize("field", ["queue_seconds", "overhead_seconds", "seconds_per_token"])
def test_a_worse_prefill_service_is_never_likelier(field: str) -> None:
    rng = random.Random(field)
    turned = 0
    for _ in range(2000):
        prompt, local, remote, policy = anything(rng)
        worse = replace(remote, **{field: getattr(remote, field) * 2 + 1})
        before, after = target(prompt, local, remote, policy), target(prompt, local, worse, policy)
        assert not (before == HERE and after != HERE)
        turned += before != after
    assert turned  # or nothing was tested


@pytest.mark.parametrize("policy", [Policy(), Policy(0.0, 0.0), Policy(5.0, 0.1)])
def test_the_first_token_is_never_later_than_the_slack_allows(policy: Policy) -> None:
    rng = random.Random(5)
    for _ in range(2000):
        prompt, local, remote, _ = anything(rng)
        estimates = [here(prompt, local), there(prompt, remote)]
        chosen = choose(estimates, policy)
        assert chosen.first_token <= (1 + policy.slack) * min(e.first_token for e in estimates)


def test_without_prefill_services_everything_is_computed_here() -> None:
    assert choose([here(Prompt(4096), Here(COST, 0.0, 10_000, 16))], POLICY).target == HERE


def test_little_is_computed_here_and_much_among_streams_there() -> None:
    idle = There("p:1", COST, 0.0, 0.004, 1e-6)
    assert target(Prompt(32), Here(COST, 0.0, 0, 0), idle) == HERE
    assert target(Prompt(2048), Here(COST, 0.0, 0, 0), idle) == HERE  # nobody is harmed, and nothing has to be moved
    assert target(Prompt(2048), Here(COST, 0.0, 0, 4), idle) == "p:1"
    assert target(Prompt(2048, context=2000), Here(COST, 0.0, 4096, 0), idle) == "p:1"


def test_streams_are_spared_where_it_costs_about_nothing() -> None:
    local, remote = Estimate(HERE, 1.0, harm=3.0), Estimate("p:1", 1.04)
    assert choose([local, remote], POLICY) is remote
    assert choose([local, remote], Policy(harm_weight=0.0)) is local
    assert choose([local, remote], Policy(slack=0.03)) is local


def test_a_full_queue_here_or_there_sends_prompts_to_the_other() -> None:
    busy, free = There("p:1", COST, 5.0, 0.004, 1e-6), There("p:2", COST, 0.0, 0.004, 1e-6)
    assert target(Prompt(512), Here(COST, 0.0, 0, 4), busy) == HERE
    estimates = [here(Prompt(512), Here(COST, 0.0, 4096, 4)), there(Prompt(512), busy), there(Prompt(512), free)]
    assert choose(estimates, POLICY).target == "p:2"


def test_what_steps_take_beside_others_is_harm_beyond_what_they_take_anyway() -> None:
    prompt = Prompt(248)
    estimate = here(prompt, Here(COST, 0.0, 0, 8))
    step = COST.prefill(248, 0, 8)
    assert estimate.harm == pytest.approx(8 * (step - COST.decode(8)))
    assert here(prompt, Here(COST, 0.0, 0, 0)).harm == 0


def test_kv_is_exposed_by_the_last_chunk_or_by_a_slow_link() -> None:
    prompt = Prompt(600)
    fast = there(prompt, There("p:1", COST, 0.0, 0.0, 1e-6))
    assert fast.exposed == pytest.approx((600 - 512) * 1e-6)
    slow = there(prompt, There("p:1", COST, 0.0, 0.0, 0.1))
    assert slow.exposed == pytest.approx(60.0 - COST.prefill(600))


def test_prompts_that_wait_share_steps() -> None:
    alone = here(Prompt(32), Here(COST, 0.0, 0, 0)).first_token
    behind = here(Prompt(32), Here(COST, 0.0, 32, 0)).first_token
    assert alone < behind < 2 * alone - 0.9 * COST.prefill_seconds
    assert here(Prompt(32), Here(COST, 0.01, 32, 0)).first_token == pytest.approx(behind + 0.01)


def test_what_the_prefill_service_has_need_not_be_computed_there() -> None:
    remote = There("p:1", COST, 0.0, 0.004, 1e-9)
    unknown, nothing, most = (replace(remote, cached_tokens=cached) for cached in (None, 0, 900))
    assert there(Prompt(1000), most).first_token < there(Prompt(1000), nothing).first_token / 4
    assert there(Prompt(1000), unknown) == there(Prompt(1000), nothing)
    # What lies in the slot here is of no use there, unless it lies there as well.
    behind = Prompt(100, 900)
    assert there(behind, unknown).first_token < there(behind, nothing).first_token / 4
    assert there(behind, most) == there(behind, unknown)
    assert there(Prompt(1), replace(remote, cached_tokens=5)).first_token > remote.overhead_seconds
