"""What one request did, as times of one monotonic clock in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

OK: Final = "OK"


@dataclass(slots=True)
class Record:
    """One request. Times are 0 until the event happened."""

    scheduled_ns: int
    """When it should have been sent."""
    sent_ns: int = 0
    token_times_ns: list[int] = field(default_factory=list)
    """When each message with tokens was received."""
    done_ns: int = 0
    """When its last message was received, or its error."""
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    response_cache: bool = False
    """The response cache answered."""
    code: str = ""
    """"OK" or the name of the status code."""

    @property
    def ok(self) -> bool:
        """It ended well."""
        return self.code == OK

    @property
    def lag_ns(self) -> int:
        """How late the generator sent it."""
        return self.sent_ns - self.scheduled_ns

    def ttft_ns(self) -> int | None:
        """Time to the first token message; None when there was none."""
        return self.token_times_ns[0] - self.scheduled_ns if self.token_times_ns else None

    def gaps_ns(self) -> list[int]:
        """Inter-token latencies: gaps between token messages."""
        return [later - earlier for earlier, later in pairwise(self.token_times_ns)]

    def e2e_ns(self) -> int:
        """Time to the last message."""
        return self.done_ns - self.scheduled_ns

    def tpot_ns(self) -> float | None:
        """Time per output token after the first; None below two tokens."""
        ttft = self.ttft_ns()
        if ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e_ns() - ttft) / (self.output_tokens - 1)
