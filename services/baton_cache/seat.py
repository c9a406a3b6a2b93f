"""One caller in a flight: what it is told, and what it may say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import BatonError
from baton_cache.metrics import JOINS

if TYPE_CHECKING:
    from baton_cache.flight import Flight

CachedAnswer = response_cache_pb2.CachedAnswer
CachedChunk = response_cache_pb2.CachedChunk
JoinResponse = response_cache_pb2.JoinResponse
Role = response_cache_pb2.JoinRole
LEADER: Final = response_cache_pb2.JOIN_ROLE_LEADER
FOLLOWER: Final = response_cache_pb2.JOIN_ROLE_FOLLOWER
_WORDS: Final = {LEADER: "leader", FOLLOWER: "follower"}

Keep = Callable[[CachedAnswer, int], Awaitable[object]]
"""Stores an answer for so many milliseconds."""


def num_tokens(chunks: Sequence[CachedChunk]) -> int:
    """Tokens of chunks."""
    return sum(len(chunk.token_ids) for chunk in chunks)


class Misbehaved(Exception):
    """A leader sent what does not fit."""


class Seat:
    """One caller in a flight.

    Args:
        flight: which.
        keep: stores its answer, should it lead.
    """

    def __init__(self, flight: Flight, keep: Keep) -> None:
        self._flight = flight
        self.keep = keep
        self._refused: BatonError | None = None

    async def responses(self) -> AsyncGenerator[JoinResponse, None]:
        """What the caller is told, to the end. The first is its seat."""
        flight = self._flight
        told: Role.ValueType | None = None
        wanted = False
        position = tokens = 0
        while True:
            if self._refused is not None:
                raise self._refused
            role = flight.role(self)
            if role == LEADER and told is None and flight.log.items:
                role = FOLLOWER  # of those who left before it came: it leads from where they were
            if told == FOLLOWER and position < len(flight.log.items):
                batch = flight.log.items[position:]
                yield JoinResponse(chunks=response_cache_pb2.JoinChunks(index=tokens, chunks=batch))
                position += len(batch)
                tokens += num_tokens(batch)
            elif role is not None and role != told and told != LEADER:
                JOINS.labels("promoted" if told else _WORDS[role]).inc()
                told = role
                yield JoinResponse(seat=response_cache_pb2.JoinSeat(role=role))
            elif told == FOLLOWER and flight.last_word is not None:
                yield flight.last_word
                return
            elif told == LEADER and (flight.settled or flight.dissolved):
                return
            elif flight.closed is not None:
                raise flight.closed
            elif told == LEADER and flight.wanted != wanted:
                wanted = flight.wanted
                yield JoinResponse(interest=response_cache_pb2.JoinInterest(wanted=wanted))
            else:
                await flight.log.changed()

    def chunks(self, chunks: response_cache_pb2.JoinChunks) -> None:
        """From the leader.

        Raises:
            Misbehaved: it does not lead, or there is a gap.
        """
        self._require_lead()
        self._flight.append(chunks)

    def done(self, answer: CachedAnswer, ttl_ms: int) -> None:
        """The leader's answer is complete.

        Raises:
            Misbehaved: it does not lead, or the answer is not the one it began.
        """
        self._require_lead()
        self._flight.complete(answer)
        self._flight.to_keep = (self, answer, ttl_ms)

    def failed(self, failed: response_cache_pb2.JoinFailed) -> None:
        """The leader failed, and so would everyone.

        Raises:
            Misbehaved: it does not lead.
        """
        self._require_lead()
        self._flight.end(JoinResponse(failed=failed))

    def refuse(self, error: BatonError) -> None:
        """End the call with an error."""
        self._refused = error
        self._flight.log.notify()

    def leave(self) -> None:
        """The caller is gone."""
        self._flight.leave(self)

    def _require_lead(self) -> None:
        if self._flight.leader is not self:
            raise Misbehaved("this caller does not lead")
        if self._flight.last_word is not None:
            raise Misbehaved("the answer has ended")
