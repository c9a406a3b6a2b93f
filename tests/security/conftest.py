"""A CA, and files that are looked at whenever they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cli.throwaway_ca import ThrowawayCa
from baton.rpc import reloaded


@pytest.fixture
def ca(tmp_path: Path) -> ThrowawayCa:
    return ThrowawayCa(tmp_path)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at at every use, not once a second."""
    monkeypatch.setattr(reloaded, "LOOK_SECONDS", 0.0)
