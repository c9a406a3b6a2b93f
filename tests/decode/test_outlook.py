"""What a decode worker remembers of its engine and of prefill services, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.engine.messages import StepReport
from baton.internal.v1 import decode_pb2
from baton.worker.step_cost import StepCost
from baton_decode.outlook import Outlook
from baton_decode.placement import HERE, Estimate, Here, Policy, Prompt, There, choose, here, there

COST = StepCost(0.008, 0.0004, 0.009, 0.0004, 3e-9, 256)


def report(seconds: float, waiting: int, decodes: int = 0) -> StepReport:
    return StepReport(
        step=1, duration_ns=int(seconds * 1e9), prefill_tokens=0, decode_requests=decodes, running=0, waiting=0,
        used_tokens=0, free_tokens=0, preempted=0, waiting_prompt_tokens=waiting,
    )  # fmt: skip


def view(outlook: Outlook, now: float, queued: int = 0, target: str = "p:1", age_ms: int = 0) -> There:
    candidate = decode_pb2.PrefillCandidate(
        target=target, waiting_prompt_tokens=queued, step_cost=COST.to_proto(), age_ms=age_ms
    )
    return outlook.there(candidate, COST, now)


def test_an_idle_worker_has_nothing_to_wait_for() -> None:
    outlook = Outlook(100)
    assert outlook.here(COST, 5.0) == Here(COST, 0.0, 0, 0)
    outlook.reported(report(0.0, 0), 6.0)
    assert outlook.here(COST, 7.0) == Here(COST, 0.0, 0, 0)


def test_a_prompt_given_to_an_idle_engine_is_in_the_step_that_runs() -> None:
    outlook = Outlook(100)
    outlook.computing_here(Prompt(300), 10.0)
    now = outlook.here(COST, 10.05)
    assert now.queued_tokens == 300 - COST.step_tokens
    assert now.step_seconds == pytest.approx(COST.prefill(COST.step_tokens) - 0.05)


def test_prompts_count_until_a_step_that_began_after_them_is_reported() -> None:
    outlook = Outlook(100)
    outlook.reported(report(0.01, 0, decodes=3), 10.0)
    outlook.computing_here(Prompt(500), 10.004)
    now = outlook.here(COST, 10.004)
    assert (now.queued_tokens, now.running) == (500, 3)
    assert now.step_seconds == pytest.approx(COST.decode(3) - 0.004)
    outlook.reported(report(0.01, 0, decodes=3), 10.01)  # that step began before the prompt; the one that runs did not
    now = outlook.here(COST, 10.02)
    assert now.queued_tokens == 500 - (256 - 3)
    assert now.step_seconds == pytest.approx(COST.prefill(253, 0, 3) - 0.01)
    outlook.reported(report(0.11, 247, decodes=3), 10.12)
    assert outlook.here(COST, 10.12).queued_tokens == 0


def test_what_was_asked_counts_before_the_router_knows() -> None:
    outlook = Outlook(100)
    assert view(outlook, 0.0).queue_seconds == 0
    for _ in range(2):
        busy = view(outlook, 0.0).queue_seconds
        outlook.asked(Estimate("p:1", busy + 0.5 + 0.01), 0.01, 0.0)
    assert view(outlook, 0.25).queue_seconds == pytest.approx(0.75)
    assert view(outlook, 2.0).queue_seconds == 0
    assert view(outlook, 0.25, target="p:2").queue_seconds == 0
    for _ in range(2):
        outlook.answered("p:1", 0.01, 0.3)
    assert view(outlook, 0.3).queue_seconds == 0


def test_the_median_of_lately_seen_overheads_counts() -> None:
    outlook = Outlook(100)
    first = view(outlook, 0.0).overhead_seconds
    for overhead in (0.002, 0.003, 0.9):
        outlook.asked(Estimate("p:1", 0.1), 0.0, 1.0)
        outlook.answered("p:1", overhead, 1.0)
    assert view(outlook, 2.0).overhead_seconds == 0.003
    assert view(outlook, 600.0).overhead_seconds == first  # a service that was slow once is asked again


def test_a_call_that_told_nothing_teaches_nothing() -> None:
    outlook = Outlook(100)
    first = view(outlook, 0.0).overhead_seconds
    outlook.asked(Estimate("p:1", 5.0), 0.0, 0.0)
    outlook.answered("p:1", None, 0.1)
    assert view(outlook, 0.2).overhead_seconds == first
    assert view(outlook, 0.2).queue_seconds == 0


def test_bandwidth_is_what_came() -> None:
    outlook = Outlook(1000)
    outlook.moved("p:1", 1_000_000, 0.1, 0.0)
    outlook.moved("p:1", 0, 0.1, 0.0)
    assert view(outlook, 1.0).seconds_per_token == pytest.approx(1e-4)


def test_a_service_that_tells_no_cost_is_taken_to_be_like_this_one() -> None:
    there = Outlook(100).there(decode_pb2.PrefillCandidate(target="p:1"), COST, 0.0)
    assert there.cost == COST


def test_chance_does_not_send_a_long_prompt_among_streams() -> None:
    """Of two workers of a kind the slower-looking one is as good; one that is slower for certain is not."""

    def placed(slower: float) -> str:
        theirs = replace(COST, seconds_per_token=COST.seconds_per_token * slower)
        candidate = decode_pb2.PrefillCandidate(target="p:1", step_cost=theirs.to_proto())
        prompt, outlook = Prompt(2048), Outlook(100)
        ways = [here(prompt, Here(COST, 0.0, 0, 4)), there(prompt, outlook.there(candidate, COST, 0.0))]
        return choose(ways, Policy()).target

    assert [placed(slower) for slower in (0.5, 1.0, 1.18, 1.5)] == ["p:1", "p:1", "p:1", HERE]


def test_only_so_many_services_are_remembered() -> None:
    outlook = Outlook(100)
    first = view(outlook, 0.0).overhead_seconds
    outlook.answered("old:1", 0.5, 0.0)
    for number in range(300):
        outlook.answered(f"p:{number}", 0.001, 0.0)
    assert view(outlook, 0.0, target="old:1").overhead_seconds == first
    assert view(outlook, 0.0, target="p:299").overhead_seconds == 0.001


def test_what_a_service_told_grows_old() -> None:
    outlook = Outlook(100)
    fresh = view(outlook, 0.0, queued=1000).queue_seconds
    assert fresh == pytest.approx(COST.prefill(1000))
    assert view(outlook, 0.0, queued=1000, age_ms=100).queue_seconds == pytest.approx(fresh - 0.1)
    assert view(outlook, 0.0, queued=1000, age_ms=60_000).queue_seconds == 0
