"""What forks an engine for the suite changes nothing about it but its parent."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from baton.engine.client import EngineClient, EngineDied
from baton.engine.config import EngineConfig
from tests.fixtures import zygote


def only_fork() -> psutil.Process:
    """The one engine that is forked now."""
    (server,) = [child for child in psutil.Process().children() if "server.py" in " ".join(child.cmdline())]
    (fork,) = server.children()
    return fork


async def until(reached: object, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not reached():  # type: ignore[operator]  # noqa: ASYNC110 nobody tells
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
async def test_it_ends_as_its_stand_in_does_and_the_other_way_round(llama: Path, signum: signal.Signals) -> None:
    client = await EngineClient.start(EngineConfig(model=llama, num_slots=2))
    fork = only_fork()
    assert sorted(fork.cpu_affinity()) == sorted(os.sched_getaffinity(0))
    os.kill(client._process.pid, signal.SIGSTOP)
    await until(lambda: fork.status() == psutil.STATUS_STOPPED)
    os.kill(client._process.pid, signal.SIGCONT)
    await until(lambda: fork.status() != psutil.STATUS_STOPPED)
    if signum == signal.SIGKILL:
        os.kill(client._process.pid, signum)
        await until(lambda: not fork.is_running())
    else:
        os.kill(fork.pid, signum)
    with pytest.raises(EngineDied):
        await client.inspect()
    assert await client._process.wait() == -signum
    await client.close()


async def test_it_can_be_left_out(llama: Path) -> None:
    with zygote.own_engines():
        client = await EngineClient.start(EngineConfig(model=llama, num_slots=2))
    assert "baton.engine.process" in psutil.Process(client._process.pid).cmdline()
    assert len(psutil.Process(client._process.pid).memory_maps()) > 50  # torch is there: it stands in for nobody
    await client.close()
