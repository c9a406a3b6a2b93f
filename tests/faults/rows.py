"""The rows of the fault matrix in full, for scripts/faults.py.

Rows that share a topology share a mesh, one after the other; what a fault killed is started again between them.
"""

from __future__ import annotations

from typing import Final

from tests.faults import epilogues, figures
from tests.faults.actions import Flip, Freeze, Hang, Kill, KillRedis, Partition, Reset, Roll, Slow, StopEngine
from tests.faults.bed import Topology
from tests.faults.driver import Load
from tests.faults.questions import Lengths
from tests.faults.scenario import At, Scenario

# Where a prompt goes depends on its length alone, not on how fast this machine is just now.
_THRESHOLD: Final = ("--prefill-placement", "threshold")
PLAIN: Final = (("prefill", ("--step-tokens", "64")), ("decode", _THRESHOLD))
_GRPC: Final = (*PLAIN, ("decode", ("--transport", "grpc")))

_LENGTHS: Final = Lengths(prompt=(4, 160), answer=(4, 64), long_prompts=0.1, long_prompt=(600, 1200))
_800: Final = Load(streams=64, requests=800)
_MINUTE: Final = Load(streams=64, seconds=60.0)
_TWO: Final = Topology(flags=PLAIN)
_TWO_ROUTERS: Final = Topology(routers=2, flags=PLAIN)
_ONE: Final = Topology(prefill=1, decode=1, flags=PLAIN)
_LINKS: Final = Topology(routers=1, flags=_GRPC)
_CACHED: Final = Topology(cache=True, flags=PLAIN)
_ALL: Final = Topology(routers=2, cache=True, flags=PLAIN)
_SLOTS: Final = ("--slot-tokens", "1280", "--num-slots", "32")
_FITS: Final = Topology(decode=1, flags=(*PLAIN, ("decode", _SLOTS)))
_TIGHT: Final = Topology(decode=1, flags=(*PLAIN, ("decode", (*_SLOTS, "--kv-tokens", "2560"))))
_READERS: Final = Topology(flags=(*PLAIN, ("router", ("--max-unsent-tokens", "64"))))
_AUTO: Final = Topology(
    prefill=1, decode=1, flags=(("prefill", ("--step-tokens", "64")), ("decode", ("--transport", "grpc")))
)
_HANDED_OVER: Final = Topology(prefill=1, decode=1, flags=(*_AUTO.flags, ("decode", ("--prefill-placement", "remote"))))
_LOCAL: Final = Topology(prefill=0, decode=1, wide=True, flags=(("decode", ("--step-tokens", "64")),))
_REMOTE: Final = Topology(
    prefill=1,
    decode=1,
    wide=True,
    flags=(("prefill", ("--step-tokens", "64")), ("decode", ("--prefill-placement", "remote"))),
)
_F, _NO = figures, figures.failed()


def _noticed(row: str, victim: str, fault: str, action: object, limit: float, topology: Topology) -> Scenario:
    """A fault of one service under the full load, and how soon it is noticed."""
    return Scenario(
        row,
        f"{fault} {victim}",
        topology,
        Load(streams=64, seconds=18.0, resumes=topology.routers > 1),
        _LENGTHS,
        (At(0.2, action),),  # type: ignore[arg-type]
        (_NO, _F.longest_pause(), _F.detected(fault.partition(" ")[0], victim, limit)),
    )


ROWS: Final = (
    Scenario(
        "F1",
        "kill -9 a prefill worker",
        _TWO,
        _800,
        _LENGTHS,
        (At(0.3, Kill("prefill-0", 1.0)),),
        (_NO, _F.remote(), _F.detected("kill", "prefill-0", 0.1), _F.longest_pause()),
    ),
    Scenario(
        "F2",
        "kill -9 a decode worker",
        _TWO,
        _800,
        _LENGTHS,
        (At(0.3, Kill("decode-0", 1.0)),),
        (_NO, _F.moved(), _F.detected("kill", "decode-0", 0.1), _F.longest_pause()),
    ),
    Scenario(
        "F3",
        "kill -9 the only prefill worker",
        _ONE,
        Load(32, 300),
        _LENGTHS,
        (At(0.3, Kill("prefill-0")),),
        (_NO, _F.longest_pause()),
    ),
    Scenario(
        "F3",
        "kill -9 the only decode worker",
        _ONE,
        Load(32, 300),
        _LENGTHS,
        (At(0.3, Kill("decode-0")),),
        (_F.told_after("kill", 1.0),),
        ("OK", "UNAVAILABLE"),
    ),
    Scenario(
        "F3",
        "kill -9 the only decode worker, back inside the re-attach window",
        Topology(prefill=1, decode=1, flags=(*PLAIN, ("router", ("--reattach-seconds", "30")))),
        Load(32, 300),
        _LENGTHS,
        (At(0.3, Kill("decode-0", 0.0)),),
        (_NO, _F.moved(), _F.longest_pause()),
    ),
    Scenario(
        "F4",
        "kill -9 a router, clients go on at the other",
        _TWO_ROUTERS,
        Load(64, 800, resumes=True),
        _LENGTHS,
        (At(0.3, Kill("router-0", 1.0)),),
        (_NO, _F.told_after("kill", 1.0), _F.freed("kill"), _F.longest_pause()),
        samples=True,
    ),
    Scenario(
        "F5",
        "kill -9 the cache",
        _CACHED,
        Load(16, seconds=20.0, cached=True),
        _LENGTHS,
        (At(0.3, Kill("cache", 2.0)),),
        (_NO, _F.from_cache(), _F.first_token()),
        questions=200,
        calm=True,
    ),
    Scenario(
        "F5",
        "kill -9 Redis",
        _CACHED,
        Load(16, seconds=20.0, cached=True),
        _LENGTHS,
        (At(0.3, KillRedis(3.0)),),
        (_NO, _F.from_cache(), _F.first_token()),
        questions=200,
        calm=True,
    ),
    *(
        _noticed("F6", victim, "freeze", Freeze(victim, 10.0), 2.5, _TWO_ROUTERS)
        for victim in ("decode-0", "prefill-0")
    ),
    Scenario(
        "F6",
        "freeze router-0",
        _TWO_ROUTERS,
        Load(64, seconds=18.0, resumes=True, ping_seconds=1.0),
        _LENGTHS,
        (At(0.2, Freeze("router-0", 10.0)),),
        (_NO, _F.told_after("freeze", 2.5), _F.longest_pause()),
    ),
    Scenario(
        "F6",
        "freeze the cache",
        _CACHED,
        Load(16, seconds=20.0, cached=True),
        _LENGTHS,
        (At(0.2, Freeze("cache", 10.0)),),
        (_NO, _F.from_cache(), _F.first_token()),
        questions=200,
        calm=True,
    ),
    *(_noticed("F7", victim, "hang", Hang(victim, 10.0), 3.0, _TWO_ROUTERS) for victim in ("decode-0", "prefill-0")),
    Scenario(
        "F7",
        "hang router-0",
        _TWO_ROUTERS,
        Load(64, seconds=18.0, resumes=True, ping_seconds=1.0),
        _LENGTHS,
        (At(0.2, Hang("router-0", 10.0)),),
        (_NO, _F.longest_pause(3.0)),
    ),
    *(
        _noticed("F7", victim, "stop the engine of", StopEngine(victim, 15.0), 3.0, _TWO_ROUTERS)
        for victim in ("decode-0", "prefill-0")
    ),
    *(
        Scenario(
            "F8",
            f"{source} and {target} apart, {direction}",
            _LINKS,
            Load(streams=64, seconds=12.0),
            _LENGTHS,
            (At(0.2, Partition(source, target, direction, 6.0)),),
            (_NO, _F.detected("partition", target, 2.5), _F.longest_pause()),
        )
        for source, target in (("router-0", "decode-0"), ("router-0", "prefill-0"), ("decode-0", "prefill-0"))
        for direction in ("forward", "backward", "both")
    ),
    *(
        Scenario(
            "F9",
            f"the handoff link: +50 ms, jitter, 10 Mbit/s; {title}",
            topology,
            Load(streams=4, seconds=25.0, prefix_cached=0.0),
            _LENGTHS,
            (At(0.0, Slow("decode-0", "prefill-0", 0.05, 0.02, 1.25e6, 25.0)),),
            (_NO, _F.spacing(1.1), *checks, _F.first_token(0.5)),
            calm=True,
        )
        for title, topology, checks in (
            ("all prompts remote", _HANDED_OVER, (_F.booked(),)),
            ("placement by cost", _AUTO, (_F.share_remote(),)),
        )
    ),
    Scenario(
        "F11",
        "bytes flipped and connections reset in handoffs",
        _LINKS,
        _MINUTE,
        _LENGTHS,
        (
            *(At(0.05, Flip(f"decode-{i}", f"prefill-{j}", 40)) for i in (0, 1) for j in (0, 1)),
            At(0.5, Reset("decode-0", "prefill-0", 20, 0.5)),
        ),
        (_NO, _F.flips()),
    ),
    Scenario(
        "F13",
        "clients that read one message a second, or nothing",
        _READERS,
        Load(32, seconds=40.0, slow=0.05, silent=0.05),
        Lengths(prompt=(4, 160), answer=(4, 200)),
        (),
        (_NO, _F.code("never reads", "RESOURCE_EXHAUSTED"), _F.spacing(1.05), _F.memory("router-0")),
        calm=True,
    ),
    Scenario(
        "F14",
        "10,000 cancels at any moment",
        _TWO,
        Load(32, 12500, cancels=0.95, cancel_within=0.5),
        Lengths(prompt=(4, 160), answer=(24, 96), long_prompts=0.1),
        (),
        (_NO, _F.cancelled(10000), _F.reclaimed()),
        samples=True,
    ),
    Scenario("F14", "kill -9 a client; cut one off", _TWO, Load(), _LENGTHS, epilogue=epilogues.lost_clients),
    Scenario(
        "F15",
        "deadlines that pass in every phase",
        _TWO,
        Load(32, 2000, hurried=0.8),
        _LENGTHS,
        (),
        (_NO, _F.told_after_deadline(), _F.reclaimed(by_deadline=True)),
        samples=True,
    ),
    Scenario("F18", "a KV pool that fits", _FITS, Load(32, 300), _LENGTHS, (), (_NO, _F.throughput())),
    Scenario(
        "F18",
        "a KV pool too small",
        _TIGHT,
        Load(32, 300),
        _LENGTHS,
        (),
        (_NO, _F.preempted(0), _F.throughput_of("a KV pool that fits", 0.7)),
    ),
    Scenario(
        "F19",
        "rolling restart of everything",
        _ALL,
        Load(32, seconds=30.0, resumes=True),
        _LENGTHS,
        (At(0.05, Roll(_ALL.services)),),
        (_NO, _F.longest_pause()),
    ),
    Scenario(
        "F21",
        "three times too much",
        _TWO,
        Load(32, seconds=20.0),
        _LENGTHS,
        (),
        (),
        ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"),
        epilogue=epilogues.overload(),
    ),
    Scenario(
        "F23",
        "10 cancelled long prompts, then a short one; prefilled by decode",
        _LOCAL,
        Load(),
        Lengths((16, 48), (4, 16), 0.5, (1100, 1200)),
        epilogue=epilogues.short_after_cancelled(),
    ),
    Scenario(
        "F23",
        "10 cancelled long prompts, then a short one; prefilled remotely",
        _REMOTE,
        Load(),
        Lengths((16, 48), (4, 16), 0.5, (1100, 1200)),
        epilogue=epilogues.short_after_cancelled(),
    ),
)
