"""The machine's limits: every kind gives a rate, and a probe that cannot is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.bench import wire
from baton.bench.limits import MEMORY, PRODUCTS, ProbeFailed, measure, probe
from baton.bench.random_model import Shape, write_model

SMALL = Shape(hidden=32, layers=1, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=300, context=256)


@pytest.mark.parametrize("carry", [wire.tcp, wire.grpc_stream])
def test_the_wire_carries(carry: object) -> None:
    assert callable(carry)
    assert carry(8 * wire.MESSAGE) > 0


@pytest.mark.slow
def test_every_limit_is_told_once_for_one_core_and_for_all(tmp_path: Path) -> None:
    write_model(tmp_path, SMALL)
    said: list[str] = []
    figures = measure(tmp_path, rounds=1, seconds=0.01, tokens=32, on_progress=said.append)
    cores = len({1, len(os.sched_getaffinity(0))})
    assert len(figures) == len(said) == cores * len((*MEMORY, *PRODUCTS)) + 2
    assert len({figure.name for figure in figures}) == len(figures)
    assert all(figure.value.median > 0 for figure in figures)


def test_a_probe_that_cannot_measure_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProbeFailed, match="bfloat16"):
        probe("bfloat16", [min(os.sched_getaffinity(0))], 0.01, tmp_path, 32)
