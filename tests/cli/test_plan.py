"""What `baton up` would start, and where a mesh is remembered."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from baton.cli import mesh
from baton.cli.mesh import Mesh, Process
from baton.cli.plan import BadSetting, Plan, parse_settings

PLAN = Plan(
    model=Path("/models/pet"),
    prefill=2,
    decode=1,
    listen="127.0.0.1:5000",
    redis_url="",
    engine={"dtype": "bfloat16"},
    extra={"router": ("--max-waiting", "3")},
)


def pairs(arguments: list[str]) -> dict[str, str]:
    """Flags with their values."""
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_engine_flags_go_to_both_tiers_only() -> None:
    assert [name for name, _ in PLAN.worker_names()] == ["prefill-0", "prefill-1", "decode-0"]
    for service in ("prefill", "decode"):
        flags = pairs(PLAN.worker_arguments(service))
        assert flags["--dtype"] == "bfloat16"
        assert (flags["--model"], flags["--model-name"]) == ("/models/pet", "pet")
        assert flags["--listen"] == "127.0.0.1:0"
    assert "--dtype" not in PLAN.cache_arguments()


def test_a_secret_is_drawn_unless_one_is_chosen() -> None:
    assert not PLAN.has_key_secret({"HOME": "/", "BATON_KEY_SECRET": ""})
    assert PLAN.has_key_secret({"BATON_KEY_SECRET": "x"})
    assert PLAN.has_key_secret({"BATON_KEY_SECRET_FILE": "/x"})
    assert replace(PLAN, extra={"cache": ("--key-secret-file", "/x")}).has_key_secret({})
    assert replace(PLAN, environment={"cache": {"BATON_KEY_SECRET": "x"}}).has_key_secret({})


def test_router_learns_all_targets() -> None:
    flags = pairs(PLAN.router_arguments(decode=["d:1"], prefill=["p:1", "p:2"], cache="c:1"))
    assert flags["--listen"] == "127.0.0.1:5000"
    assert (flags["--decode-targets"], flags["--prefill-targets"]) == ("d:1", "p:1,p:2")
    assert (flags["--cache-target"], flags["--max-waiting"]) == ("c:1", "3")


def test_settings_become_flags_of_their_service() -> None:
    assert parse_settings(["decode.max_waiting=5", "decode.x=a=b", "cache.y="]) == {
        "decode": ("--max-waiting", "5", "--x", "a=b"),
        "cache": ("--y", ""),
    }
    assert parse_settings(["decode.prefix_cache=false", "router.allow-unauthenticated=true"]) == {
        "decode": ("--no-prefix-cache",),
        "router": ("--allow-unauthenticated",),
    }


@pytest.mark.parametrize("setting", ["", "x", "decode=5", "decode.=5", "decode.x", "gateway.x=5"])
def test_settings_of_another_form_are_refused(setting: str) -> None:
    with pytest.raises(BadSetting):
        parse_settings([setting])


def test_a_mesh_is_remembered_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    router = Process("router", "router", "127.0.0.1:7", "", 1)
    running = Mesh("1", "127.0.0.1:7", "pet", "redis://", os.getpid(), (router,))
    assert mesh.target_or_default(None) == mesh.DEFAULT_TARGET
    path = mesh.last_ready_file()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    mesh.write(path, running)
    assert mesh.last() == running
    assert mesh.target_or_default(None) == "127.0.0.1:7"
    assert mesh.target_or_default("other:1") == "other:1"
    mesh.remove(path, os.getpid() + 1)
    assert path.exists()
    mesh.remove(path, os.getpid())
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"services": 3}'])
def test_a_file_that_describes_no_mesh_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ready.json"
    path.write_text(text)
    assert mesh.read(path) is None


def test_a_mesh_whose_owner_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mesh.write(mesh.last_ready_file(), Mesh("1", "127.0.0.1:7", "pet", "redis://", 2**22 - 1, ()))
    assert mesh.last() is None
