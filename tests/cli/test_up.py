"""`baton up` starts everything, tells where it is, and leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.conftest import wait_for


def test_serves_says_where_and_stops_without_a_trace(baton_up: Callable[..., Any], tmp_path: Any) -> None:
    up = baton_up("--decode", "2", "--json", "--log-dir", str(tmp_path / "logs"))
    ready = up.ready()
    names = [service["name"] for service in ready["services"]]
    assert names == ["router", "cache", "prefill-0", "decode-0", "decode-1"]
    assert ready["pid"] == up.process.pid
    assert ready["model"] == "model"
    for service in ready["services"]:
        for address in (service["grpc"], service["metrics"]):
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5):
                pass

    up.process.send_signal(signal.SIGTERM)
    code, out, err = up.wait()
    assert code == 0, err
    assert json.loads(out) == ready
    assert up.survivors() == []
    assert not up.ready_file.exists()
    assert list((up.runtime / "baton").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == sorted(f"{name}.log" for name in names)
    assert not list(tmp_path.glob("baton-*"))


def test_stops_whoever_calls_before_who_is_called(baton_up: Callable[..., Any]) -> None:
    up = baton_up()
    up.ready()
    up.process.send_signal(signal.SIGINT)
    code, _, err = up.wait()
    assert code == 0
    stopped = [line.split()[0] for line in err.splitlines() if line.endswith(" stopped")]
    assert stopped == ["router", "decode-0", "prefill-0", "cache"]


def test_flags_reach_the_services(baton_up: Callable[..., Any]) -> None:
    up = baton_up("--prefill", "0", "--model-name", "pet", "--dtype", "bfloat16", "--set", "decode.num-slots=3")
    ready = up.ready()
    assert [service["name"] for service in ready["services"]] == ["router", "cache", "decode-0"]
    with open(f"/proc/{up.pid('decode-0')}/cmdline", encoding="utf-8") as file:
        decode = file.read().split("\0")
    assert decode[decode.index("--dtype") + 1] == "bfloat16"
    assert decode[decode.index("--num-slots") + 1] == "3"
    assert decode[decode.index("--model-name") + 1] == "pet"
    with open(f"/proc/{up.pid('router')}/cmdline", encoding="utf-8") as file:
        router = file.read().split("\0")
    assert "--prefill-targets" not in router
    assert router[router.index("--decode-targets") + 1] == ready["services"][2]["grpc"]


def environment(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ", encoding="utf-8") as file:
        return dict(entry.partition("=")[::2] for entry in file.read().split("\0") if entry)


def test_a_secret_is_drawn_for_the_cache_and_shown_to_nobody(baton_up: Callable[..., Any]) -> None:
    up = baton_up()
    ready = up.ready()
    secret = environment(up.pid("cache"))["BATON_KEY_SECRET"]
    assert len(set(secret)) > 8
    assert len(secret) == 64
    for service in ready["services"]:
        with open(f"/proc/{service['pid']}/cmdline", encoding="utf-8") as file:
            assert secret not in file.read()
        assert service["name"] == "cache" or "BATON_KEY_SECRET" not in environment(service["pid"])
    assert secret not in json.dumps(ready)


def test_a_chosen_secret_is_kept(baton_up: Callable[..., Any]) -> None:
    up = baton_up(BATON_KEY_SECRET="chosen")
    up.ready()
    assert environment(up.pid("cache"))["BATON_KEY_SECRET"] == "chosen"


def test_a_service_that_dies_while_loading_ends_all(baton_up: Callable[..., Any]) -> None:
    up = baton_up(FAKE_DIE="decode")
    code, _, err = up.wait()
    assert code == 1
    assert "decode-0 ended with code 1" in err
    assert "no room for the weights" in err
    assert up.survivors() == []
    assert not up.ready_file.exists()


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGUSR1, "ended with code 1"), (signal.SIGKILL, "SIGKILL")])
def test_a_service_that_dies_later_is_reported_and_ends_all(
    baton_up: Callable[..., Any], signum: signal.Signals, said: str
) -> None:
    up = baton_up()
    os.kill(up.pid("prefill-0"), signum)
    code, _, err = up.wait()
    assert code == 1
    assert "prefill-0" in err
    assert said in err
    assert up.survivors() == []


def test_stopping_while_it_still_starts(baton_up: Callable[..., Any]) -> None:
    up = baton_up()
    wait_for(lambda: len(up.family()) > 3, 20)
    up.process.send_signal(signal.SIGINT)
    code, _, err = up.wait()
    assert code == 0, err
    wait_for(lambda: up.survivors() == [], 5)


def test_a_second_ctrl_c_does_not_wait(baton_up: Callable[..., Any]) -> None:
    up = baton_up("--drain-seconds", "60", FAKE_DEAF="router")
    up.ready()
    up.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert up.process.poll() is None
    up.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, _, _ = up.wait()
    assert code == 130
    assert time.monotonic() - began < 3
    wait_for(lambda: up.survivors() == [], 5)


def test_a_deaf_service_is_killed_after_its_grace(baton_up: Callable[..., Any]) -> None:
    up = baton_up("--drain-seconds", "0", FAKE_DEAF="decode")
    up.ready()
    began = time.monotonic()
    up.process.send_signal(signal.SIGTERM)
    code, _, _ = up.wait()
    assert code == 0
    assert 4 < time.monotonic() - began < 15
    assert up.survivors() == []


@pytest.mark.parametrize("deaf", ["", "cache"])
def test_nothing_survives_when_it_is_killed(baton_up: Callable[..., Any], tmp_path: Any, deaf: str) -> None:
    up = baton_up("--drain-seconds", "0", FAKE_DEAF=deaf)
    up.ready()
    up.process.kill()
    up.process.communicate(timeout=10)
    wait_for(lambda: up.survivors() == [], 15)
    wait_for(lambda: not list(tmp_path.glob("baton-*")), 5)


def test_a_taken_port_is_named_before_anything_starts(baton_up: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        up = baton_up("--listen", address)
        code, _, err = up.wait()
    assert code == 1
    assert f"{address} is taken" in err
    assert "--listen" in err


def test_other_commands_find_the_mesh(baton_up: Callable[..., Any]) -> None:
    up = baton_up()
    ready = up.ready()
    status = up.run("status", "--json")
    assert status.returncode == 0
    state = json.loads(status.stdout)
    assert [service["health"] for service in state["services"]] == ["serving"] * 4
    assert state["services"][2]["load"]["running"] == 3
    table = up.run("status", "--ready-file", str(up.ready_file))
    assert "250/1,000" in table.stdout
    answer = up.run("generate", "Once upon a time", "--quiet")
    assert (answer.returncode, answer.stdout) == (0, " Once upon a time\n")
    wrong = up.run("generate", "x", "--target", "127.0.0.1:1")
    assert wrong.returncode == 1
    assert "nothing answers at 127.0.0.1:1" in wrong.stderr
    assert ready["router"] == state["target"]
