"""What a ledger says of a first token: computing, moving bytes, and all the rest, which is orchestration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from baton.v1 import ledger_pb2

_COMPUTE: Final = frozenset({ledger_pb2.KIND_COMPUTE})
_WIRE: Final = frozenset({ledger_pb2.KIND_NETWORK, ledger_pb2.KIND_TRANSFER, ledger_pb2.KIND_SERIALIZE})


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Milliseconds; they sum to the time to the first token as the router saw it."""

    compute: float
    wire: float
    """Between services, encoding and exposed handoff included."""
    orchestration: float
    """Queueing, tokenizing, looking up, deciding, and what nobody accounted for."""

    @staticmethod
    def of(ledger: ledger_pb2.LatencyLedger) -> FirstToken:
        """From a ledger that has a first token."""
        partition = ledger.first_token
        compute = sum(_ms(entry) for entry in partition.entries if entry.kind in _COMPUTE)
        wire = sum(_ms(entry) for entry in partition.entries if entry.kind in _WIRE)
        return FirstToken(compute, wire, partition.total.ToNanoseconds() / 1e6 - compute - wire)


def _ms(entry: ledger_pb2.LedgerEntry) -> float:
    return entry.duration.ToNanoseconds() / 1e6
