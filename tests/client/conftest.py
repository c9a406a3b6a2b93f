"""A scripted server for every test that wants one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.scripted import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server of this test's own."""
    with ScriptedServer() as running:
        yield running
