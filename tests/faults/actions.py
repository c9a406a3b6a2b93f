"""What is done to a mesh, as entries of a scenario's timeline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.faults.bed import Bed

_BUSY_SECONDS = 5.0


class Action(Protocol):
    """One thing done to a mesh; it ends when its effect does."""

    async def do(self, bed: Bed) -> None:
        """Do it."""


@dataclass(frozen=True, slots=True)
class Kill:
    """kill -9 a service while it has work; start it again `restart_after` seconds later. None: only after the run."""

    name: str
    restart_after: float | None = None

    async def do(self, bed: Bed) -> None:
        await _busy(bed, self.name)
        bed.kill(self.name)
        await bed.service(self.name).process.wait()
        if self.restart_after is not None:
            await asyncio.sleep(self.restart_after)
            await bed.start(self.name)


@dataclass(frozen=True, slots=True)
class Freeze:
    """SIGSTOP a service and its engine while it has work, SIGCONT `seconds` later."""

    name: str
    seconds: float = 10.0

    async def do(self, bed: Bed) -> None:
        await _busy(bed, self.name)
        bed.freeze(self.name)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            bed.thaw(self.name)


@dataclass(frozen=True, slots=True)
class Hang:
    """Hold a service's event loop from inside while it has work."""

    name: str
    seconds: float = 10.0

    async def do(self, bed: Bed) -> None:
        await _busy(bed, self.name)
        bed.hang(self.name, self.seconds)
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True, slots=True)
class StopEngine:
    """A device that does not answer: the engine stands still while its service lives, until that gives up and ends."""

    name: str
    seconds: float = 10.0

    async def do(self, bed: Bed) -> None:
        await _busy(bed, self.name)
        bed.stop_engine(self.name)
        try:
            async with asyncio.timeout(self.seconds):
                await bed.service(self.name).process.wait()
            bed.note(f"{self.name} gave up")
        except TimeoutError:
            bed.note(f"{self.name} lives on")
        finally:
            bed.continue_engine(self.name)


@dataclass(frozen=True, slots=True)
class Partition:
    """Nothing passes between two services in one direction or in both ("forward", "backward", "both")."""

    source: str
    target: str
    direction: str = "both"
    seconds: float = 6.0

    async def do(self, bed: Bed) -> None:
        link = bed.link(self.source, self.target)
        sides = [link.forward] * (self.direction != "backward") + [link.backward] * (self.direction != "forward")
        bed.note(f"partition {self.source}>{self.target} {self.direction}")
        for side in sides:
            side.black_hole = True
        try:
            await asyncio.sleep(self.seconds)
        finally:
            for side in sides:
                side.black_hole = False
            bed.note(f"heal {self.source}>{self.target}")


@dataclass(frozen=True, slots=True)
class Slow:
    """A link gets slow both ways."""

    source: str
    target: str
    delay: float
    jitter: float
    bytes_per_second: float
    seconds: float

    async def do(self, bed: Bed) -> None:
        link = bed.link(self.source, self.target)
        bed.note(f"slow {self.source}>{self.target}")
        for side in (link.forward, link.backward):
            side.delay_seconds, side.jitter_seconds = self.delay, self.jitter
            side.bytes_per_second = self.bytes_per_second
        try:
            await asyncio.sleep(self.seconds)
        finally:
            link.clear()


@dataclass(frozen=True, slots=True)
class Reset:
    """Connections from a service to another are reset, again and again."""

    source: str
    target: str
    times: int = 5
    every: float = 0.5

    async def do(self, bed: Bed) -> None:
        for _ in range(self.times):
            bed.note(f"reset {self.source}>{self.target}")
            bed.link(self.source, self.target).cut()
            await asyncio.sleep(self.every)


@dataclass(frozen=True, slots=True)
class Flip:
    """One byte of each of the next large pieces that come back from a service is flipped."""

    source: str
    target: str
    count: int = 20

    async def do(self, bed: Bed) -> None:
        bed.note(f"flip {self.source}<{self.target}")
        bed.link(self.source, self.target).backward.flips += self.count


@dataclass(frozen=True, slots=True)
class Roll:
    """One service after another is terminated, and started again once it ended by itself."""

    names: Sequence[str]
    pause: float = 1.0

    async def do(self, bed: Bed) -> None:
        for name in self.names:
            code = await bed.terminate(name)
            if code:
                bed.note(f"{name} ended with {code}")
            await bed.start(name)
            bed.note(f"{name} is back")
            await asyncio.sleep(self.pause)


@dataclass(frozen=True, slots=True)
class KillRedis:
    """kill -9 Redis; it is back, and empty, after a while."""

    back_after: float = 2.0

    async def do(self, bed: Bed) -> None:
        assert bed.redis is not None, "this mesh has no Redis"
        bed.note("kill redis")
        bed.redis.kill()
        await asyncio.sleep(self.back_after)
        await asyncio.to_thread(bed.redis.start)


async def _busy(bed: Bed, name: str) -> None:
    """Wait until a worker has calls, decode two: one may be just ending. A while at most: it may get none."""
    if not name.startswith(("prefill", "decode")):
        return
    wanted = 2 if name.startswith("decode") else 1
    loop = asyncio.get_running_loop()
    end = loop.time() + _BUSY_SECONDS
    while loop.time() < end:
        if len((await bed.service(name).debug_state()).calls) >= wanted:
            return
        await asyncio.sleep(0.005)
