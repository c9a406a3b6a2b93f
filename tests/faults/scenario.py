"""One scenario format: a topology, a load, a timeline of faults, checks; and how one is run."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.faults.actions import Action
from tests.faults.bed import Bed, Topology
from tests.faults.checker import Held, Violation, Wrong, judge, leaks
from tests.faults.driver import Driver, Load
from tests.faults.history import History, Question
from tests.faults.questions import Lengths
from tests.faults.sampler import Sampler

_WAIT = 0.02
_WARM = Load(streams=8, requests=32)


@dataclass(frozen=True, slots=True)
class At:
    """An action, once so much of the load is done: 0 to 1."""

    share: float
    action: Action


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a run.

    Attributes:
        name: of what.
        wanted: the number to reach, in words; empty: it is only told.
        value: what was measured, in words.
        met: whether it was reached.
    """

    name: str
    wanted: str
    value: str
    met: bool = True


@dataclass(slots=True)
class Run:
    """A scenario that was run.

    Attributes:
        history: what clients saw; that of the load alone.
        before: what services held before.
        after: what they held after it all.
        calm: the same load without a fault, where the scenario wants it to compare with.
        sampler: what workers held while it ran, where the scenario wants that.
        happened: what was done, and when.
        earlier: results of other scenarios, by row.
        began_at: when the load began, and `loaded_until`, when it ended.
        wall: the wall clock less the monotonic one, seconds.
    """

    scenario: Scenario
    bed: Bed
    history: History
    before: dict[str, Held]
    after: dict[str, Held] = field(default_factory=dict)
    calm: History | None = None
    sampler: Sampler | None = None
    happened: list[tuple[float, str]] = field(default_factory=list)
    earlier: Mapping[str, Result] = field(default_factory=dict)
    began_at: float = 0.0
    loaded_until: float = 0.0
    wall: float = 0.0

    @property
    def goodput(self) -> float:
        """Tokens of requests that ended OK, per second of the load."""
        tokens = sum(len(asked.tokens) for asked in self.history.requests if asked.code == "OK")
        return tokens / max(1e-9, self.loaded_until - self.began_at)

    def when(self, prefix: str) -> float:
        """When something was first done."""
        return next(at for at, text in self.happened if text.startswith(prefix))

    def times(self, prefix: str) -> list[float]:
        return [at for at, text in self.happened if text.startswith(prefix)]


Check = Callable[[Run], Figure]
Epilogue = Callable[[Bed, Driver], Awaitable[Sequence[Figure]]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the matrix, or a part of it.

    Attributes:
        row: "F1".
        title: the fault, in words.
        topology: the mesh.
        load: who asks what.
        lengths: of prompts and answers.
        timeline: faults, by how far the load is.
        checks: figures beyond those of every scenario.
        allowed: codes with which a patient client's request may end.
        questions: how many different ones.
        calm: whether the same load is first run without a fault.
        samples: whether what workers hold is watched all the time.
        epilogue: what is done after the load, before the mesh must be quiet.
    """

    row: str
    title: str
    topology: Topology = field(default_factory=Topology)
    load: Load = field(default_factory=Load)
    lengths: Lengths = field(default_factory=Lengths)
    timeline: tuple[At, ...] = ()
    checks: tuple[Check, ...] = ()
    allowed: tuple[str, ...] = ("OK",)
    questions: int = 64
    calm: bool = False
    samples: bool = False
    epilogue: Epilogue | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a scenario."""

    row: str
    title: str
    requests: int
    codes: dict[str, int]
    violations: tuple[Violation, ...]
    figures: tuple[Figure, ...]
    happened: tuple[tuple[float, str], ...]
    goodput: float
    seconds: float

    @property
    def held(self) -> bool:
        """Nothing was broken, and every number reached."""
        return not self.violations and all(figure.met for figure in self.figures)


async def perform(
    scenario: Scenario, bed: Bed, book: Sequence[Question], seed: int = 0, earlier: Mapping[str, Result] | None = None
) -> Result:
    """Run a scenario on a mesh of its topology; the mesh is whole and quiet before and after."""
    began = time.monotonic()
    await bed.mend()
    if not bed.warm:
        async with Driver(book, bed.routers, seed) as driver:
            await driver.run(_WARM)
        bed.warm = True
    before = await bed.quiesce()
    calm = None
    if scenario.calm:
        async with Driver(book, bed.routers, seed + 1) as driver:
            calm = await driver.run(scenario.load)
        before = await bed.quiesce()
    bed.happened.clear()
    extra: Sequence[Figure] = ()
    async with Driver(book, bed.routers, seed) as driver:
        sampler = Sampler(bed) if scenario.samples else None
        run = Run(scenario, bed, driver.history, before, calm=calm, sampler=sampler, earlier=earlier or {})
        run.began_at, run.wall = time.monotonic(), time.time() - time.monotonic()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(sampler.watch()) if sampler else None
            acting = [group.create_task(_act(entry, driver, bed)) for entry in scenario.timeline]
            driver.goes_on = lambda: not all(task.done() for task in acting)
            if scenario.load.requests or scenario.load.seconds:
                await driver.run(scenario.load)
            run.loaded_until = time.monotonic()
            await asyncio.gather(*acting)
            if watching:
                await asyncio.sleep(0.5)
                watching.cancel()
        if scenario.epilogue:
            extra = await scenario.epilogue(bed, driver)
        driver.history.closed_at = time.monotonic()
    await bed.mend()
    run.happened = list(bed.happened)
    run.after = await bed.quiesce(wanted=before)
    violations = judge(run.history, scenario.allowed) + leaks(before, run.after)
    violations += [Violation(Wrong.LEAKED, None, f"left behind: {text}") for text in bed.orphans()]
    figures = [*(check(run) for check in scenario.checks), *extra]
    return Result(
        row=scenario.row,
        title=scenario.title,
        requests=len(run.history.requests),
        codes=run.history.codes(),
        violations=tuple(violations),
        figures=tuple(figures),
        happened=tuple((at - run.began_at, text) for at, text in run.happened),
        goodput=run.goodput,
        seconds=time.monotonic() - began,
    )


async def _act(entry: At, driver: Driver, bed: Bed) -> None:
    while driver.progress.share < entry.share:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(driver.progress.changed.wait(), _WAIT)
    await entry.action.do(bed)
