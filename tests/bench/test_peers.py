"""The comparison with other engines: with Baton itself for all of them, and with one that does not come up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from baton.bench.random_model import Shape, write_model
from tests.bench.peers.cases import VOCAB
from tests.bench.peers.compare import Peer, compare, markdown

SMALL = Shape(hidden=32, layers=1, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=VOCAB, context=4096)
RUNNER = "tests.bench.peers.baton_runner"


@pytest.mark.slow
async def test_all_are_asked_the_same_and_one_that_fails_drops_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", SMALL)
    peers = [
        Peer("broken", Path(sys.executable), RUNNER, ("--shape", "none")),
        Peer("engine", Path(sys.executable), RUNNER, ("--shape", "engine")),
    ]
    found = await compare(peers, tmp_path / "model", 1, ("one", "prefill"), tmp_path / "lock", tmp_path)
    assert found["broken"] == {"one": [], "prefill": []}
    assert "broken ended with status 2" in capsys.readouterr().err
    (one,), (prefill,) = found["engine"]["one"], found["engine"]["prefill"]
    assert one["streams"] == 1
    assert one["tokens_per_second"] > 0
    assert prefill["ttft_ms"] > 0
    assert {"own", "others"} <= one.keys()


def test_the_table_has_a_row_for_every_engine_and_a_dash_for_what_failed() -> None:
    one = [{"tokens_per_second": speed, "ttft_ms": 40.0} for speed in (60.0, 70.0, 80.0)]
    mixed = [{"undisturbed_gap_ms": 13.0, "worst_gap_ms": 26.0, "ttft_ms": 1000.0}]
    lines = markdown({"A": {"one": one, "mixed": mixed}, "B": {"one": []}}).splitlines()
    assert lines[2] == "| A | 70 [60–80] (40) | – | – | – | 13 | 26 | 1,000 |"
    assert lines[3] == "| B | – | – | – | – | – | – | – |"
