"""When an engine that does not answer is given up."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from baton.engine.watchdog import Silence, Verdict, processor_delay


def looked(silence: Silence, times: int, elapsed: float, delay_each: float = 0.0) -> None:
    for _ in range(times):
        silence.looked(elapsed, silence.delay + delay_each)


@pytest.mark.parametrize(
    ("seconds", "longest_step", "verdict"),
    [
        (1.0, 0.01, Verdict.WAIT),
        (1.25, 0.01, Verdict.STALLED),
        (2.25, 0.01, Verdict.STALLED),
        (2.5, 0.01, Verdict.HUNG),
        (2.5, 1.0, Verdict.WAIT),
        (6.0, 1.0, Verdict.STALLED),
        (10.0, 1.0, Verdict.HUNG),
    ],
)
def test_silence_is_judged_by_time_and_by_steps(seconds: float, longest_step: float, verdict: Verdict) -> None:
    silence = Silence(interval=0.25, delay=3.0)
    looked(silence, round(seconds / 0.25), 0.25)
    assert silence.verdict(2.5, longest_step) is verdict


def test_waiting_for_a_processor_is_not_silence() -> None:
    silence = Silence(interval=0.25, delay=7.0)
    looked(silence, 400, 0.25, delay_each=0.26)
    assert silence.verdict(2.5, 0.0) is Verdict.WAIT
    silence = Silence(interval=0.25, delay=7.0)
    looked(silence, 400, 0.25, delay_each=0.2)
    assert silence.verdict(2.5, 0.0) is Verdict.HUNG, "a starved engine that never answers is given up all the same"


def test_nor_is_what_we_slept_through() -> None:
    """Both of us were stopped for a minute: it gets as long to answer as if we had not been."""
    silence = Silence(interval=0.25, delay=0.0)
    looked(silence, 1, 60.0)
    assert silence.verdict(2.5, 0.0) is Verdict.WAIT


def test_a_delay_that_cannot_be_read_any_more_counts_as_none() -> None:
    silence = Silence(interval=0.25, delay=5.0)
    silence.looked(0.25, 0.0)
    silence.looked(0.25, 5.0)
    assert silence.seconds == 0.5


def _spin(seconds: float) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not tell")
def test_the_kernel_tells_who_waits_for_a_processor() -> None:
    context = multiprocessing.get_context("fork")
    rivals = [context.Process(target=_spin, args=(1.0,)) for _ in range(2)]
    for rival in rivals:
        rival.start()
    time.sleep(0.8)
    assert all(processor_delay(rival.pid or 0) > 0.05 for rival in rivals)
    for rival in rivals:
        rival.join()
    assert processor_delay(rivals[0].pid or 0) == 0.0
