"""The router, the cache and the `baton` command run where torch and transformers are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import importlib
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["baton_router.app", "baton_cache.app", "baton.cli.main", "baton.client"])
def test_runs_without_torch(module: str) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, module], check=True, timeout=60)


def test_the_check_can_fail() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "baton.engine.engine"], capture_output=True, timeout=60)
    assert b"No module named 'torch'" in done.stderr
