"""The rows of the fault matrix in short, all on one mesh, for the test command."""

from __future__ import annotations

from typing import Final

from tests.faults import epilogues, figures
from tests.faults.actions import Flip, Freeze, Hang, Kill, KillRedis, Partition, Reset, Roll
from tests.faults.bed import Topology
from tests.faults.driver import Load
from tests.faults.questions import Lengths
from tests.faults.rows import PLAIN
from tests.faults.scenario import At, Check, Scenario

LENGTHS: Final = Lengths(prompt=(4, 160), answer=(4, 48), long_prompts=0.12, long_prompt=(700, 1000))
TOPOLOGY: Final = Topology(
    routers=2,
    cache=True,
    flags=(
        *PLAIN,
        ("decode-0", ("--transport", "grpc")),  # the other one takes shared memory
        # Too little for what it gets: it preempts and computes again.
        ("decode-1", ("--num-slots", "10", "--slot-tokens", "1088", "--kv-tokens", "1088")),
        ("router", ("--max-unsent-tokens", "64")),
    ),
)
_SOME: Final = Load(streams=12, requests=70, resumes=True)


def _short(
    row: str, title: str, *timeline: At, load: Load = _SOME, checks: tuple[Check, ...] = (), **rest: object
) -> Scenario:
    checks = (figures.failed(), *checks)
    return Scenario(row, title, TOPOLOGY, load, LENGTHS, timeline, checks, **rest)  # type: ignore[arg-type]


SHORT: Final = (
    _short("F18", "a KV pool too small", load=Load(24, 90), checks=(figures.remote(),)),
    _short("F1", "kill -9 a prefill worker", At(0.2, Kill("prefill-0"))),
    _short("F2", "kill -9 a decode worker", At(0.2, Kill("decode-0")), checks=(figures.moved(),)),
    _short("F4", "kill -9 a router", At(0.2, Kill("router-0"))),
    _short(
        "F5",
        "kill -9 the cache, then Redis",
        At(0.2, Kill("cache")),
        At(0.6, KillRedis(0.5)),
        load=Load(12, 70, cached=True, resumes=True),
    ),
    _short("F6", "freeze a decode worker", At(0.2, Freeze("decode-0", 4.0))),
    _short("F7", "hold a prefill worker's event loop", At(0.2, Hang("prefill-1", 4.0))),
    _short("F8", "partition decode from prefill", At(0.2, Partition("decode-0", "prefill-0", "backward", 4.0))),
    _short(
        "F11",
        "reset and corrupt handoffs",
        At(0.1, Flip("decode-0", "prefill-0", 4)),
        At(0.1, Flip("decode-0", "prefill-1", 4)),
        At(0.5, Reset("decode-0", "prefill-0", 3, 0.2)),
        checks=(figures.flips(),),
    ),
    _short(
        "F13",
        "clients that read slowly or never",
        load=Load(12, 50, slow=0.1, slow_seconds=0.2, silent=0.1, silent_seconds=1.0),
        allowed=("OK", "RESOURCE_EXHAUSTED"),
    ),
    _short(
        "F14",
        "cancels at any moment",
        load=Load(12, 250, cancels=0.8, cancel_within=0.4),
        checks=(figures.cancelled(25),),
    ),
    _short(
        "F15",
        "deadlines that pass at any moment",
        load=Load(12, 150, hurried=0.8),
        checks=(figures.code("hurried", "DEADLINE_EXCEEDED", 0.03),),
    ),
    _short(
        "F19",
        "rolling restart",
        At(0.0, Roll(("prefill-0", "decode-0", "router-0", "cache"), 0.1)),
        load=Load(8, seconds=2.0, resumes=True),
    ),
    _short(
        "F23",
        "cancelled long prompts, then a short one",
        load=Load(),
        epilogue=epilogues.short_after_cancelled(judged=False),
    ),
)
"""In an order in which each finds what it needs. None of them judges a time: machines that run tests are busy."""
