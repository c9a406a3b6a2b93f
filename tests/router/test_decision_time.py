"""A decision takes so little that nobody waits for it; `scripts/measure_placement.py` has the figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_placement.py"


def test_a_decision_among_32_workers(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("measure_placement", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.timed(32, 2048, 300)
    processor, _ = capsys.readouterr().out.splitlines()
    assert "processor time" in processor
    p50 = float(processor.partition("p50 ")[2].partition(",")[0])
    assert p50 < 10, "milliseconds; a quiet machine takes half of one"
