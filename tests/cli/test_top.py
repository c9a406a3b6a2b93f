"""`baton top` ends when told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.cli import console, top
from baton.cli.main import app
from baton.internal.v1 import observe_pb2


def test_ctrl_c_is_the_way_out_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(*_: Any, **__: Any) -> Iterator[observe_pb2.WatchMeshResponse]:
        yield observe_pb2.WatchMeshResponse()
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "_states", states)
    result = CliRunner().invoke(app, ["top", "--admin", "127.0.0.1:1", "--json"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "cancelled" not in result.output


def test_every_count_of_a_rate_is_divided_by_the_time() -> None:
    state = observe_pb2.WatchMeshResponse(outcomes={"ok": 150, "worker_lost": 50}, cache_hits=30, coalesced=70)
    state.window.FromNanoseconds(10_000_000_000)
    with console.out.capture() as captured:
        console.out.print(top.screen(state, "127.0.0.1:1"))
    rows = {line.split("  ")[0]: line.split()[-1] for line in captured.get().splitlines() if line.strip()}
    assert (rows["requests"], rows["cache hits"], rows["coalesced"]) == ("20.0", "3.0", "7.0")
    assert rows["worker_lost"] == "5.0"
