"""Models shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import random_llama


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random llama with a context of 512."""
    return random_llama(tmp_path_factory.mktemp("small-llama"))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider random llama with a context of 2048: its handoffs take long enough to be interrupted."""
    return random_llama(tmp_path_factory.mktemp("long-llama"), hidden=256, layers=6, context=2048, seed=1)
