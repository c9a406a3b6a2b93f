"""The device's benchmark runs, if not fast, where there is no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.bench import gpu


def test_all_figures_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [figure["what"].split(",")[0] for figure in written["figures"]] == [
        "decode",
        "decode",
        "prefill",
        "KV of 32 tokens to the host",
        "speed of a prompt of 32 while its KV leaves",
    ]
    assert all(0 < figure["lowest"] <= figure["value"] <= figure["highest"] for figure in written["figures"])
    assert all(figure["limit"] > 0 for figure in written["figures"])
    assert (tmp_path / "gpu.md").read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "cuda" in capsys.readouterr().err
