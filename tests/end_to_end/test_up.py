"""`baton up` with the real services: it serves, answers, and leaves nothing behind however it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import psutil

from tests.fixtures.up import BATON, running_up


async def baton(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *BATON, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


def traces() -> set[str]:
    """What a process could leave behind outside itself."""
    return {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")} | {
        str(path) for path in Path("/tmp").glob("baton-*") if not path.name.startswith("baton-test-")
    }


def all_gone(family: list[psutil.Process], seconds: float = 10) -> bool:
    return not psutil.wait_procs(family, timeout=seconds)[1]


async def test_serves_answers_and_leaves_nothing(small_model: Path, tmp_path: Path) -> None:
    before = traces()
    async with running_up(
        tmp_path, small_model, "--prefill", "2", "--decode", "2", "--prefill-placement", "remote"
    ) as up:
        assert [s["name"] for s in up.ready["services"]] == [
            "router", "cache", "prefill-0", "prefill-1", "decode-0", "decode-1",
        ]  # fmt: skip
        target = up.ready["router"]
        asked = ("generate", "x" * 100, "--target", target, "--max-tokens", "8", "--temperature", "0", "--json")
        first, second = json.loads(await baton(*asked)), json.loads(await baton(*asked))
        assert first["text"] == second["text"]
        assert first["prefill_placement"] == "remote"
        assert second["cache"] == "hit"
        status = json.loads(await baton("status", "--target", target, "--json"))
        assert status["serving"] is True
        family = up.family
        assert len(family) >= 6 + 4  # services, their engines
        up.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(up.process.wait(), 20) == 0
        assert all_gone(family)
    assert traces() - before <= {str(Path("/tmp") / f"baton-{os.getuid()}")}


async def test_a_dead_service_ends_the_rest_and_is_named(small_model: Path, tmp_path: Path) -> None:
    async with running_up(tmp_path, small_model) as up:
        family = up.family
        os.kill(up.service("decode-0"), signal.SIGKILL)
        assert await asyncio.wait_for(up.process.wait(), 20) == 1
        assert all_gone(family)
        said = up.output.read_text()
        assert "decode-0" in said
        assert "serving" in said


async def test_killed_itself_it_leaves_nothing(small_model: Path, tmp_path: Path) -> None:
    """kill -9 of `baton up`: its guard ends the services, Redis included."""
    async with running_up(tmp_path, small_model) as up:
        family = up.family
        up.process.kill()
        await up.process.wait()
        assert all_gone(family[1:], 20)


async def test_model_that_cannot_be_served(tmp_path: Path) -> None:
    """The reason is on the screen, not in a log file somewhere."""
    from tests import model_zoo

    model = model_zoo.build("bloom", tmp_path / "bloom")
    process = await asyncio.create_subprocess_exec(
        *BATON, "up", "--listen", "127.0.0.1:0", "--model", str(model),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 1
    assert "does not let its attention be replaced" in out.decode()
    assert "Traceback" not in out.decode()
