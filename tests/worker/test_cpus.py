"""`--cpus`: which cores a service and its engine run on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from baton.worker.cpus import BadCpus, parse_cpus, pin
from baton.worker.settings import WorkerSettings

PIN = """
import os, subprocess, sys, threading
from baton.worker.cpus import parse_cpus, pin
waiting = threading.Event()
thread = threading.Thread(target=waiting.wait)
thread.start()
pin(parse_cpus(sys.argv[1]))
print(sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(thread.native_id)))
print(subprocess.run([sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"],
                     capture_output=True, text=True).stdout)
waiting.set()
"""


@pytest.mark.parametrize(
    ("text", "cores"), [("", set()), ("3", {3}), ("0-2", {0, 1, 2}), ("0-1,8", {0, 1, 8}), (" 1 , 4-4", {1, 4})]
)
def test_lists_of_cores(text: str, cores: set[int]) -> None:
    assert parse_cpus(text) == cores


@pytest.mark.parametrize("text", ["all", "1-", "-1", "3-1", "1;2", "0x1", "1,,2"])
def test_what_is_no_list_is_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(BadCpus, match="0-3,8"):
        parse_cpus(text)
    with pytest.raises(ValidationError, match="0-3,8"):
        WorkerSettings(cpus=text)


def test_a_pinned_process_takes_its_threads_and_children_along() -> None:
    core = max(os.sched_getaffinity(0))
    done = subprocess.run([sys.executable, "-c", PIN, str(core)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [f"[{core}] [{core}]", f"[{core}]"]


def test_a_core_that_is_not_there_is_named() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(BadCpus, match="core 4095"):
        pin(frozenset({4095}))
    assert os.sched_getaffinity(0) == before
