"""What a handoff costs: how long KV moved, and how much of that the request had to wait for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.handoff import transport
from baton.handoff.transport import Transport
from baton.internal.v1 import timing_pb2
from baton.telemetry.tracing import Attribute
from baton.v1 import inference_pb2


@dataclass(slots=True)
class Handoff:
    """One handoff as the receiver sees it; all times are nanoseconds of its monotonic clock.

    The sender says of its messages how long after PrefillAccepted, by its own clock, what they carry was there. They
    took the way that PrefillAccepted took, so what passed here beyond that, they spent waiting and moving. No clock is
    ever compared with another one.

    Attributes:
        transport: by which KV comes; one that is given up is followed by another.
        hidden_ns: in which KV moved while the prompt was still being computed; known with the first token.
        behind_ns: that the first token spent behind KV on the way.
        progress: the sender's last account of its time.
    """

    transport: Transport = inference_pb2.TRANSPORT_UNSPECIFIED
    accepted_ns: int = 0
    first_token_ns: int = 0
    done_ns: int = 0
    hidden_ns: int = 0
    behind_ns: int = 0
    chunks: int = 0
    bytes: int = 0
    progress: timing_pb2.HopTiming = field(default_factory=timing_pb2.HopTiming)
    _moved_ns: int = 0  # in which at least one chunk was waiting or moving, up to `_last_ns`
    _last_ns: int = 0

    @property
    def moved_ns(self) -> int:
        """In which at least one chunk was waiting or moving."""
        return self._moved_ns

    @property
    def exposed_ns(self) -> int:
        """The request waited so long for bytes: its first token behind them, and itself from then to the last one."""
        return self.behind_ns + (max(0, self.done_ns - self.first_token_ns) if self.done_ns else 0)

    def chunk(self, since_accepted_ns: int, came_ns: int, now_ns: int) -> None:
        """A chunk is here that was computed so long after PrefillAccepted.

        Its message came at `came_ns`: from then at the latest it moved, however slow PrefillAccepted was.
        """
        since = max(min(self.accepted_ns + since_accepted_ns, came_ns), self._last_ns)
        self._moved_ns += max(0, now_ns - since)
        self._last_ns = now_ns
        self.chunks += 1

    def first_token(self, since_accepted_ns: int, now_ns: int) -> None:
        """The first token is here, sampled so long after PrefillAccepted."""
        self.first_token_ns = now_ns
        sampled_ns = self.accepted_ns + since_accepted_ns
        if self.chunks:
            self.behind_ns = max(0, now_ns - sampled_ns)
        # All chunks that came before it were computed before it was sampled, so KV moved from then to the last of them.
        self.hidden_ns = max(0, self._moved_ns - max(0, self._last_ns - sampled_ns))

    def attributes(self) -> dict[str, Attribute]:
        """For its span."""
        return {
            "baton.transport": transport.name(self.transport),
            "baton.handoff.bytes": self.bytes,
            "baton.handoff.chunks": self.chunks,
            "baton.handoff.hidden_ms": self.hidden_ns / 1e6,
            "baton.handoff.exposed_ms": self.exposed_ns / 1e6,
        }
