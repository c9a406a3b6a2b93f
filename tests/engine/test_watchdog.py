"""When an engine that does not answer is given up."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from baton.engine.watchdog import Silence, Verdict, processor_delays


def looked(silence: Silence, times: int, elapsed: float, delay_each: float = 0.0) -> None:
    for _ in range(times):
        silence.looked(elapsed, {1: silence.delays[1] + delay_each})


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
    silence = Silence(interval=0.25, delays={1: 3.0})
    looked(silence, round(seconds / 0.25), 0.25)
    assert silence.verdict(2.5, longest_step) is verdict


def test_waiting_for_a_processor_is_not_silence() -> None:
    silence = Silence(interval=0.25, delays={1: 7.0})
    looked(silence, 400, 0.25, delay_each=0.26)
    assert silence.verdict(2.5, 0.0) is Verdict.WAIT
    silence = Silence(interval=0.25, delays={1: 7.0})
    looked(silence, 400, 0.25, delay_each=0.2)
    assert silence.verdict(2.5, 0.0) is Verdict.HUNG, "a starved engine that never answers is given up all the same"


def test_nor_is_what_we_slept_through() -> None:
    """Both of us were stopped for a minute: it gets as long to answer as if we had not been."""
    silence = Silence(interval=0.25, delays={1: 0.0})
    looked(silence, 1, 60.0)
    assert silence.verdict(2.5, 0.0) is Verdict.WAIT


def test_a_delay_that_cannot_be_read_any_more_counts_as_none() -> None:
    silence = Silence(interval=0.25, delays={1: 5.0})
    silence.looked(0.25, {})
    silence.looked(0.25, {1: 5.0})
    assert silence.seconds == 0.5


def test_each_thread_is_compared_with_itself() -> None:
    """Whoever starves is not always who has waited most since the start."""
    silence = Silence(interval=0.25, delays={1: 100.0, 2: 1.0})
    for look in range(1, 401):
        silence.looked(0.25, {1: 100.0, 2: 1.0 + 0.26 * look})
    assert silence.verdict(2.5, 0.0) is Verdict.WAIT
    for _ in range(10):
        silence.looked(0.25, {2: 105.0})
    assert silence.seconds == 2.5


def test_a_new_thread_counts_from_when_it_was_first_seen() -> None:
    silence = Silence(interval=0.25, delays={1: 5.0})
    silence.looked(0.25, {1: 5.0, 2: 7.0})
    assert silence.seconds == 0.25
    silence.looked(0.25, {1: 5.0, 2: 7.25})
    assert silence.seconds == 0.25


def test_a_thread_that_ends_while_it_is_looked_at_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.watchdog._PROC", tmp_path)
    for thread in (10, 11, 12):
        (tmp_path / f"10/task/{thread}").mkdir(parents=True)
    for thread in (10, 12):
        (tmp_path / f"10/task/{thread}/schedstat").write_text(f"1 {thread}00000000 1\n")
    assert processor_delays(10) == {10: 1.0, 12: 1.2}


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
    assert all(max(processor_delays(rival.pid or 0).values()) > 0.05 for rival in rivals)
    for rival in rivals:
        rival.join()
    assert processor_delays(rivals[0].pid or 0) == {}
