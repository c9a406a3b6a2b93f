"""`baton bench` and its commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import random_llama

MISSED = 4
"""Less than wanted: on a busy machine, with a model of this size, that may well be."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("models") / "small", context=512)


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    """`baton bench` with these flags."""
    command = [sys.executable, "-m", "baton.cli", "bench", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def figures(path: Path) -> dict[str, Any]:
    """By name, from the JSON a command wrote."""
    return {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}


def test_flags_without_a_command_are_the_load_generators() -> None:
    for flags in (("--rate", "1"), ("load", "--rate", "1")):
        done = bench(*flags, "--concurrency", "1")
        assert done.returncode == 2
        assert "choose" in done.stderr


def test_help_lists_the_commands() -> None:
    said = bench("--help").stdout
    assert all(name in said for name in ("load", "limits", "engine", "stall", "mesh", "streaming", "placement"))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    for command in ("limits", "engine", "stall", "mesh", "placement"):
        done = bench(command, "--model", str(tmp_path))
        assert done.returncode == 2
        assert "holds no model" in done.stderr


@pytest.mark.slow
def test_the_engine_alone(model: Path, tmp_path: Path) -> None:
    result, table = tmp_path / "a.json", tmp_path / "a.md"
    done = bench(
        *("engine", "--model", str(model), "--dtype", "float32", "--rounds", "1", "--steps", "2", "--context", "8"),
        *("--longest", "200", "--json", str(result), "--markdown", str(table)),
    )
    assert done.returncode in (0, MISSED), done.stderr
    found = figures(result)
    assert {"decode, batch 16, after 8 tokens", "prefill, 200 tokens", "step overhead after 200 tokens"} <= found.keys()
    assert "| prefill, 200 tokens |" in table.read_text()
    assert ("missed" in done.stderr) == (done.returncode == MISSED)


@pytest.mark.slow
def test_the_mesh_beside_its_engine(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "a.json"
    done = bench(
        *("mesh", "--model", str(model), "--dtype", "float32", "--rounds", "1", "--streams", "2"),
        *("--prompt-tokens", "16", "--output-tokens", "6", "--json", str(result)),
    )
    assert done.returncode in (0, MISSED), done.stderr
    found = figures(result)
    assert found["2 streams through the mesh"]["limit_name"] == "engine alone"
    parts = sum(found[f"TTFT: {part}"]["value"]["median"] for part in ("compute", "wire", "orchestration"))
    # The router's time to the first token is a part of the client's.
    assert 0 < parts <= found["TTFT through the mesh"]["value"]["median"]


@pytest.mark.slow
def test_long_prompts_among_streams(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "a.json"
    done = bench(
        *("stall", "--model", str(model), "--dtype", "float32", "--rounds", "1", "--streams", "2"),
        *("--prompt-tokens", "300", "--arrivals", "1", "--quiet-seconds", "0.1", "--json", str(result)),
    )
    assert done.returncode in (0, MISSED), done.stderr
    found = figures(result)
    for name in ("divided", "undivided"):
        assert found[f"{name}: worst gap"]["value"]["median"] > 0
        assert found[f"{name}: TTFT of the long prompts"]["value"]["median"] > 0


@pytest.mark.slow
def test_what_a_token_costs_each_hop(model: Path, tmp_path: Path) -> None:
    result = tmp_path / "a.json"
    done = bench(
        *("streaming", "--model", str(model), "--rounds", "1", "--streams", "1,3", "--output-tokens", "12"),
        *("--json", str(result)),
    )
    assert done.returncode == 0, done.stderr
    found = figures(result)
    for streams in ("1 stream", "3 streams"):
        for hop in ("router", "decode"):
            assert found[f"{streams}: {hop}"]["value"]["median"] > 0
            assert found[f"{streams}: {hop}"]["limit"]["median"] > 0
        assert found[f"{streams}: message"]["value"]["median"] >= 1
    assert bench("streaming", "--streams", "1,x").returncode == 2
