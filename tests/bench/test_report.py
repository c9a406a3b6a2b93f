"""The definitions, on records made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load import Load, Run
from baton.bench.present import lag_refusal, markdown
from baton.bench.record import Record
from baton.bench.report import Distribution, Objectives, percentile, report
from baton.bench.workload import BadLengths, Lengths, Workload

MS = 1_000_000


def record(scheduled: int, sent: int, *tokens: int, done: int, code: str = "OK") -> Record:
    """A request with one token per message; all times in ms."""
    return Record(
        scheduled_ns=scheduled * MS,
        sent_ns=sent * MS,
        token_times_ns=[token * MS for token in tokens],
        done_ns=done * MS,
        output_tokens=len(tokens),
        prompt_tokens=10,
        cached_prompt_tokens=5,
        code=code,
    )


def test_latency_counts_from_the_scheduled_time_not_from_the_late_send() -> None:
    late = record(100, 140, 150, 160, 180, done=181)
    assert late.lag_ns == 40 * MS
    assert late.ttft_ns() == 50 * MS
    assert late.gaps_ns() == [10 * MS, 20 * MS]
    assert late.e2e_ns() == 81 * MS
    assert late.tpot_ns() == (81 - 50) / 2 * MS


def test_report_counts_good_requests_and_errors_apart() -> None:
    records = [
        record(0, 0, 50, 60, 70, done=70),
        record(1000, 1000, 1100, 1110, done=1110),
        record(1500, 1500, done=2000, code="RESOURCE_EXHAUSTED"),
    ]
    result = report(Run(records), Load(rate=1.0, requests=3), Objectives(ttft_ms=60))
    assert (result.requests, result.completed, result.good) == (3, 2, 1)
    assert result.errors == {"RESOURCE_EXHAUSTED": 1}
    assert result.seconds == 2.0
    assert result.requests_per_second == 1.0
    assert result.tokens_per_second == 2.5
    assert result.goodput == 0.5
    assert result.cached_share == 0.5
    assert result.ttft is not None
    assert result.ttft.mean == 75 * MS
    assert result.itl is not None
    assert result.itl.count == 3
    assert "| errors | 1 RESOURCE_EXHAUSTED |" in markdown(result)


def test_a_late_generator_is_refused_with_its_lag() -> None:
    late = [record(0, 6, 50, done=60) for _ in range(50)]
    result = report(Run(late), Load(rate=1.0, requests=50), Objectives())
    assert not result.lag_acceptable
    assert "lag p99 6.0 ms" in lag_refusal(result)
    prompt = [record(0, 1, 50, done=60) for _ in range(50)]
    assert report(Run(prompt), Load(rate=1.0, requests=50), Objectives()).lag_acceptable


def test_closed_loop_lag_is_the_event_loops() -> None:
    run = Run([record(0, 0, 50, done=60)], loop_lag_ns=[7 * MS] * 10)
    assert not report(run, Load(concurrency=1, requests=1), Objectives()).lag_acceptable


def test_an_empty_run_is_no_division_by_zero() -> None:
    result = report(Run(), Load(concurrency=1, requests=1), Objectives())
    assert result.completed == 0
    assert result.ttft is None
    assert result.to_json()["latency_ms"]["ttft"] is None


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=50), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-3)
    distribution = Distribution.of(values)
    assert distribution is not None
    assert distribution.lowest <= distribution.percentiles[50] <= distribution.highest


@pytest.mark.parametrize("text", ["", "0", "9-3", "a", "5-", "-5", "3~", "1.5"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadLengths):
        Lengths.parse(text)


def test_jobs_repeat_with_their_seed_and_fit_the_context() -> None:
    lengths = Lengths.parse("64~1.0"), Lengths.parse("1-40")
    workload = Workload(*lengths, vocab_size=1000, max_context=128, shared_prefix=16)
    jobs = [job for job, _ in zip(workload.jobs(3), range(200), strict=False)]
    assert jobs == [job for job, _ in zip(workload.jobs(3), range(200), strict=False)]
    assert jobs != [job for job, _ in zip(workload.jobs(4), range(200), strict=False)]
    for job in jobs:
        assert len(job.prompt) >= 1
        assert len(job.prompt) + job.output_tokens <= 128
        assert all(isinstance(token, int) and 16 <= token < 1000 for token in job.prompt)
    assert len({job.prompt[:16] for job in jobs if len(job.prompt) >= 16}) == 1


def test_prompts_of_a_file_come_in_turn() -> None:
    fixed = Lengths.parse("8")
    workload = Workload(fixed, fixed, vocab_size=100, max_context=0, prompts=("a", "b"))
    jobs = workload.jobs(0)
    assert [next(jobs).prompt for _ in range(3)] == ["a", "b", "a"]
