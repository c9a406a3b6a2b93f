"""The rows of the fault matrix as scenarios."""

from __future__ import annotations

from typing import Final

from tests.faults import figures
from tests.faults.actions import Kill
from tests.faults.bed import Topology
from tests.faults.driver import Load
from tests.faults.questions import Lengths
from tests.faults.scenario import At, Scenario

SHORT_LENGTHS: Final = Lengths(prompt=(4, 160), answer=(4, 48), long_prompts=0.1)
SHORT_TOPOLOGY: Final = Topology(
    flags=(
        ("prefill", ("--step-tokens", "64")),
        # Where a prompt goes depends on its length alone, not on how fast this machine is just now.
        ("decode", ("--prefill-placement", "threshold")),
        ("decode-0", ("--transport", "grpc")),  # the other one takes shared memory
    )
)
_SHORT: Final = Load(streams=12, requests=80)

SHORT: Final = (
    Scenario(
        "F1",
        "kill -9 a prefill worker",
        SHORT_TOPOLOGY,
        _SHORT,
        timeline=(At(0.2, Kill("prefill-0")),),
        checks=(figures.failed(), figures.remote()),
    ),
    Scenario(
        "F2",
        "kill -9 a decode worker",
        SHORT_TOPOLOGY,
        _SHORT,
        timeline=(At(0.2, Kill("decode-0")),),
        checks=(figures.failed(), figures.moved()),
    ),
    Scenario(
        "F14",
        "clients cancel at any moment",
        SHORT_TOPOLOGY,
        Load(streams=12, requests=200, cancels=0.8, cancel_within=0.4),
    ),
)
