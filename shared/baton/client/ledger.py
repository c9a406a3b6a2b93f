"""Where a request's time went, as plain values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.v1 import ledger_pb2


@dataclass(frozen=True, slots=True)
class Entry:
    """The time one hop spent in one way on the request."""

    hop: str
    """"router", "cache", "decode" or "prefill"."""
    kind: str
    """"compute", "queue", "network", "transfer", "serialize", "cache", "tokenize", "stall" or "overhead"."""
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Partition:
    """One interval, split: entries and residual sum to the total. All nanoseconds."""

    total_ns: int
    entries: tuple[Entry, ...]
    residual_ns: int
    hidden_transfer_ns: int
    """KV moved while the request computed: beside the partition, not in it."""

    def by_kind(self) -> dict[str, int]:
        """Nanoseconds by kind over all hops, longest first."""
        return _summed((entry.kind, entry.duration_ns) for entry in self.entries)

    def by_hop(self) -> dict[str, int]:
        """Nanoseconds by hop over all kinds, longest first."""
        return _summed((entry.hop, entry.duration_ns) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Ledger:
    """A request's time, from the router's receipt on. None: the server did not report that interval."""

    first_token: Partition | None
    """Up to the first token handed to the transport."""
    total: Partition | None
    """Up to the last message handed to the transport."""


def from_proto(ledger: ledger_pb2.LatencyLedger) -> Ledger:
    """The plain form of a ledger message."""
    return Ledger(
        first_token=_partition(ledger.first_token) if ledger.HasField("first_token") else None,
        total=_partition(ledger.total) if ledger.HasField("total") else None,
    )


def _partition(partition: ledger_pb2.Partition) -> Partition:
    return Partition(
        total_ns=partition.total.ToNanoseconds(),
        entries=tuple(
            Entry(_hop(entry.hop), _kind(entry.kind), entry.duration.ToNanoseconds()) for entry in partition.entries
        ),
        residual_ns=partition.residual.ToNanoseconds(),
        hidden_transfer_ns=partition.hidden_transfer.ToNanoseconds(),
    )


def _hop(value: int) -> str:
    known = ledger_pb2.Hop.DESCRIPTOR.values_by_number.get(value)  # a newer server may name hops we do not know
    return known.name.removeprefix("HOP_").lower() if known else f"hop {value}"


def _kind(value: int) -> str:
    known = ledger_pb2.Kind.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("KIND_").lower() if known else f"kind {value}"


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, duration in pairs:
        sums[name] = sums.get(name, 0) + duration
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
