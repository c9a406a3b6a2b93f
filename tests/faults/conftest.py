"""The model of the fault suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import random_llama


@pytest.fixture(scope="session")
def fault_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with a context of 2048, small enough that two cores serve many streams of it."""
    return random_llama(tmp_path_factory.mktemp("fault-llama"), hidden=64, layers=3, context=2048, seed=3)
