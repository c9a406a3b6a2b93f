"""One generation that all who ask the same at the same time share: who leads, who follows, and what is known of it.

The leader is one of the callers here, or somewhere behind another replica. When a leader goes without an end, the next
caller leads. When nobody is left, the flight is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.message import DecodeError

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import BatonError
from baton.rpc.stream_log import StreamLog
from baton_cache.metrics import JOINS
from baton_cache.relay import Relay
from baton_cache.seat import (
    FOLLOWER,
    LEADER,
    CachedAnswer,
    CachedChunk,
    JoinResponse,
    Keep,
    Misbehaved,
    Role,
    Seat,
    num_tokens,
)
from baton_cache.store import StoreFailed

log = logging.getLogger(__name__)

RENEW_SECONDS: Final = 0.25
POLL_SECONDS: Final = 0.05
PUBLISH_SECONDS: Final = POLL_SECONDS / 2
"""Between two writes for other replicas, which poll: one for every token would not come sooner."""

Find = Callable[[], Awaitable[CachedAnswer | None]]
"""Reads the stored answer."""


class Flight:
    """See above.

    Args:
        relay: to the other replicas.
        find: reads the stored answer.
        max_bytes: of an answer in the making; from there on everyone is alone.
        here_only: whether only callers of this replica share it.

    Attributes:
        log: chunks known here.
        leader: whoever generates, if that is a caller of this replica.
        last_word: what followers are told at the end; None: it has not come.
        settled: whether nothing is left to do for it, storing included.
        dissolved: whether everyone goes on alone.
        closed: why this replica does no more for it.
        to_keep: the answer that has to be stored, for so many milliseconds, and who brought it.
    """

    def __init__(self, relay: Relay, find: Find, max_bytes: int, here_only: bool = False) -> None:
        self._relay = relay
        self._find = find
        self._max_bytes = max_bytes
        self._here_only = here_only
        self._bytes = 0
        self._tokens = 0
        self._seats: list[Seat] = []
        self._led_elsewhere = False
        self._wanted_elsewhere = False
        self._leased = False
        self._published = self._published_tokens = 0  # chunks and their tokens, to other replicas
        self.log: StreamLog[CachedChunk] = StreamLog()
        self.leader: Seat | None = None
        self.last_word: JoinResponse | None = None
        self.settled = False
        self.dissolved = False
        self.closed: BatonError | None = None
        self.to_keep: tuple[Seat, CachedAnswer, int] | None = None

    @property
    def wanted(self) -> bool:
        """Whether anybody but the leader wants the chunks."""
        return self._wanted_elsewhere or any(seat is not self.leader for seat in self._seats)

    def take_seat(self, keep: Keep) -> Seat:
        """One caller more."""
        seat = Seat(self, keep)
        self._seats.append(seat)
        self.log.notify()
        return seat

    def leave(self, seat: Seat) -> None:
        """One caller less."""
        self._seats.remove(seat)
        if self.leader is seat:
            self.leader = None
        self.log.notify()

    def role(self, seat: Seat) -> Role.ValueType | None:
        """What a caller is now; None: that is not known yet."""
        if seat is self.leader or self.dissolved:
            return LEADER
        if self.leader is not None or self._led_elsewhere or self.last_word is not None:
            return FOLLOWER
        return None

    def append(self, chunks: response_cache_pb2.JoinChunks) -> None:
        """The next chunks.

        Raises:
            Misbehaved: they do not follow on what is there.
        """
        if chunks.index != self._tokens:
            raise Misbehaved(f"token {chunks.index} instead of {self._tokens}")
        self._bytes += chunks.ByteSize()
        if self._bytes > self._max_bytes:
            self.dissolve("the answer is too long")
            return
        self._tokens += num_tokens(chunks.chunks)
        self.log.extend(chunks.chunks)

    def complete(self, answer: CachedAnswer) -> None:
        """All of the answer.

        Raises:
            Misbehaved: it begins in another way than it did.
        """
        known = len(self.log.items)
        if answer.chunks[:known] != self.log.items:
            raise Misbehaved("the answer is not the one that was begun")
        self.log.extend(answer.chunks[known:])
        end = response_cache_pb2.JoinEnd(finish_reason=answer.finish_reason, usage=answer.usage)
        self.end(JoinResponse(end=end))

    def end(self, last_word: JoinResponse) -> None:
        """Followers are told this after the last chunk."""
        self.last_word = last_word
        self.log.notify()

    def dissolve(self, why: str) -> None:
        """Everyone goes on alone."""
        log.info("callers of one answer go on alone: %s", why)
        JOINS.labels("dissolved").inc()
        self.dissolved = True
        self.log.notify()

    def close(self, error: BatonError) -> None:
        """Send everyone elsewhere, unless there is an end already."""
        if self.last_word is None:
            self.closed = error
            self.log.notify()

    async def run(self) -> None:
        """Until it has ended, or nobody is in it."""
        while True:
            await self._round()
            if self._leased:
                self._leased = False
                try:
                    await self._relay.release()
                except StoreFailed:
                    log.debug("a lease was not given back: it will expire")
            if self.last_word is not None or self.dissolved or not self._seats:
                self.settled = True
                self.log.notify()
                return

    async def _round(self) -> None:
        """From asking who leads until that has to be asked again."""
        if self._here_only:
            await self._led_here()
            return
        try:
            claim = await self._relay.claim()
        except StoreFailed:  # then there is no other replica to share with
            await self._led_here()
            return
        self._leased = claim.ours
        if claim.answered and (answer := await self._find()) is not None:
            self._finish(answer)
        elif claim.ours:
            await self._led_here()
        else:
            await self._follow(to_the_answer=not claim.answered)

    async def _led_here(self) -> None:
        """Callers lead, one after the other, until there is an end or nobody."""
        renewed_at = asyncio.get_running_loop().time()
        self._published = self._published_tokens = 0
        while self._seats and self.last_word is None and not self.dissolved:
            if self.leader is None:
                self.leader = self._seats[0]
                self.log.notify()
            await self._changed(POLL_SECONDS if self._wanted_elsewhere else RENEW_SECONDS if self._leased else None)
            now = asyncio.get_running_loop().time()
            news = self._wanted_elsewhere and self._published < len(self.log.items)
            if self._leased and now >= renewed_at + (PUBLISH_SECONDS if news else RENEW_SECONDS):
                renewed_at = now
                await self._renew()
        if self.to_keep is not None:
            seat, answer, ttl_ms = self.to_keep
            await seat.keep(answer, ttl_ms)
        self.leader = None
        self._wanted_elsewhere = False

    async def _renew(self) -> None:
        """Keep the lease, and pass chunks on if they are wanted."""
        chunks = None
        items = self.log.items[self._published :]
        if self._wanted_elsewhere and items:
            chunks = response_cache_pb2.JoinChunks(index=self._published_tokens, chunks=items)
        try:
            held = await self._relay.hold(self._published, chunks)
            if not held.ours:  # Redis was flushed, or did not hear from us for long
                self._leased = (await self._relay.claim()).ours
                self._published = self._published_tokens = 0
                return
        except StoreFailed:
            return  # the lease may expire; then another replica's callers lead too
        if chunks is not None:
            self._published += len(items)
            self._published_tokens += num_tokens(items)
        if held.wanted != self._wanted_elsewhere:
            self._wanted_elsewhere = held.wanted
            self.log.notify()

    async def _follow(self, *, to_the_answer: bool) -> None:
        """A caller of another replica leads: read what it gets, until nobody leads any more or the answer is stored."""
        self._led_elsewhere = True
        self.log.notify()
        last = "0"
        try:
            while self._seats:
                heard = await self._relay.listen(last)
                last = heard.last
                for position, chunks in heard.chunks:
                    self._append_from(position, chunks)
                if not heard.led or (heard.answered and to_the_answer):
                    return
                await asyncio.sleep(POLL_SECONDS)
        except (StoreFailed, DecodeError, KeyError, ValueError) as error:
            log.debug("another replica's generation is lost: %s", error)
        except Misbehaved as error:
            self.dissolve(str(error))
        finally:
            self._led_elsewhere = False

    def _append_from(self, position: int, chunks: response_cache_pb2.JoinChunks) -> None:
        """Those of the relayed chunks that are new here.

        Raises:
            Misbehaved: they do not fit to those that are not.
        """
        known = len(self.log.items) - position
        if known < 0:
            raise Misbehaved("chunks are missing")
        new = chunks.chunks[known:]
        if new:
            self.append(
                response_cache_pb2.JoinChunks(index=chunks.index + num_tokens(chunks.chunks[:known]), chunks=new)
            )

    def _finish(self, answer: CachedAnswer) -> None:
        """It was stored in the meantime."""
        try:
            self.complete(answer)
        except Misbehaved as error:
            self.dissolve(str(error))

    async def _changed(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.log.changed()
        except TimeoutError:
            return
