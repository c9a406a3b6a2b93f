"""A request's time in the router: one timeline for the whole, and one that stops at the first token."""

from __future__ import annotations

from baton.internal.v1 import timing_pb2
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_router.metrics import entries


class Account:
    """Both partitions of the latency ledger in the making.

    A callee's timing that comes with the first token covers only the time until then, and its final one covers that
    again: so the first is booked into a timeline of its own.
    """

    __slots__ = ("_bookable", "_first", "_first_known", "_first_token", "_settled", "_total")

    def __init__(self) -> None:
        self._total = Timeline(ledger_pb2.HOP_ROUTER)
        self._first = Timeline(ledger_pb2.HOP_ROUTER)
        self._first_known = False
        self._first_token: ledger_pb2.Partition | None = None
        self._settled = False
        self._bookable = True

    def enter(self, kind: ledger_pb2.Kind.ValueType, hop: ledger_pb2.Hop.ValueType | None = None) -> None:
        """From now on the request is in this state."""
        if self._settled:
            return
        self._total.enter(kind, hop)
        if not self._first_known:
            self._first.enter(kind, hop)

    def book(self, callee: ledger_pb2.Hop.ValueType, timing: timing_pb2.HopTiming) -> None:
        """Book the account of a call that is over."""
        if not self._bookable:
            return
        self._total.book(callee, timing)
        if not self._first_known:
            self._first.book(callee, timing)

    def settle(self, *, bookable: bool) -> None:
        """From now on the request stalls, for good: what is still done for its answer is not its time.

        Args:
            bookable: whether the call that is running ends now, so that its account is of the time until now.
        """
        self.enter(ledger_pb2.KIND_STALL)
        self._settled, self._bookable = True, bookable

    def first_token(self, timing: timing_pb2.HopTiming | None = None) -> None:
        """The first token is here, with decode's account until then, and waits for the client. Later: nothing."""
        if not self._first_known:
            self._first_known = True
            if timing is not None:
                self._first.book(ledger_pb2.HOP_DECODE, timing)
            self._first.enter(ledger_pb2.KIND_STALL)

    def handed_over(self) -> None:
        """A token goes to the transport: with the first one its partition ends. Later calls do nothing."""
        if self._first_known and self._first_token is None:
            self._first_token = self._first.partition()

    def ledger(self) -> ledger_pb2.LatencyLedger:
        """The ledger until now."""
        return ledger_pb2.LatencyLedger(first_token=self._first_token, total=self._total.partition())


def server_timing(ledger: ledger_pb2.LatencyLedger) -> str:
    """The ledger in the form of the web's Server-Timing header, milliseconds: "router_tokenize;dur=0.412, ..."."""
    parts = [f"{hop}_{kind};dur={seconds * 1e3:.3f}" for hop, kind, seconds in entries(ledger.total)]
    if ledger.HasField("first_token"):
        parts.append(f"first_token;dur={ledger.first_token.total.ToNanoseconds() / 1e6:.3f}")
    parts.append(f"residual;dur={ledger.total.residual.ToNanoseconds() / 1e6:.3f}")
    parts.append(f"hidden_transfer;dur={ledger.total.hidden_transfer.ToNanoseconds() / 1e6:.3f}")
    parts.append(f"total;dur={ledger.total.total.ToNanoseconds() / 1e6:.3f}")
    return ", ".join(parts)
