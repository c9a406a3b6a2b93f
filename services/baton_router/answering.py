"""Where one request's answer comes from: the source of its flight.

1. A request that may share asks the cache for a seat. A hit is replayed. A follower takes the chunks of whoever leads.
   A leader generates, lets others follow, and stores the answer.
2. When the cache is silent, or goes away, the request is generated here, from where it is.
3. A request that may only read looks the answer up; one that may only write generates and fills.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import BatonError, DeadlineExceeded, NotFound
from baton.v1 import inference_pb2, ledger_pb2
from baton_router.admission import Admission, Place
from baton_router.catalogue import Serving
from baton_router.chunks import CachedChunk
from baton_router.flight import Ending, Flight
from baton_router.generation import Generation, Tier, ask_of
from baton_router.join import CacheLost, Join
from baton_router.metrics import CACHE_FAILURES
from baton_router.record import Record
from baton_router.response_cache import ResponseCache, cacheable, may_share
from baton_router.ticket import Ticket
from baton_router.validate import ResolvedRequest

MODE_ONLY = inference_pb2.CACHE_MODE_ONLY
MODE_REFRESH = inference_pb2.CACHE_MODE_REFRESH
HIT = inference_pb2.CACHE_STATUS_HIT
MISS = inference_pb2.CACHE_STATUS_MISS
BYPASS = inference_pb2.CACHE_STATUS_BYPASS
COALESCED = inference_pb2.CACHE_STATUS_COALESCED
SEMANTIC = inference_pb2.CACHE_STATUS_SEMANTIC


@dataclass(frozen=True, slots=True)
class Means:
    """What all requests share to get their answers."""

    tier: Tier
    admission: Admission
    cache: ResponseCache
    max_request_seconds: float
    follow_silence_seconds: float


class Answering:
    """Gets one answer.

    Args:
        means: to get it by.
        record: of the request that started the flight; its account is charged, even after it left.
        request: what to answer.
        tenant: whose it is.
        start: what the cache is asked.
        serving: the model it was tokenized for.
    """

    def __init__(
        self,
        means: Means,
        record: Record,
        request: ResolvedRequest,
        tenant: str,
        start: response_cache_pb2.JoinStart,
        serving: Serving,
    ) -> None:
        self._means = means
        self._record = record
        self._account = record.account
        self._request = request
        self._tenant = tenant
        self._start = start
        self._serving = serving
        self._poisonous = False
        self.status: inference_pb2.CacheStatus.ValueType = BYPASS

    async def fly(self, flight: Flight) -> None:
        """Write the answer into the flight.

        Raises:
            BatonError: there will be none.
        """
        if self._means.cache.enabled and may_share(self._request):
            await self._share(flight)
        elif self._request.cache_mode == MODE_ONLY:
            await self._look_up(flight)
        else:
            flight.land(await self._generate(flight))
            if self._means.cache.enabled and cacheable(self._request) and self._request.cache_mode == MODE_REFRESH:
                self._fill(flight)

    async def _share(self, flight: Flight) -> None:
        self._status(MISS)
        if not self._means.admission.congested(self._serving.fingerprint):
            flight.accept()  # there is a place, in all likelihood, and a hit does not wait to be told of
        self._account.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_CACHE)
        async with self._means.cache.join(self._start, flight) as join:
            if join is None:
                self._account.enter(ledger_pb2.KIND_OVERHEAD)
                flight.land(await self._generate(flight))
                self._fill(flight)  # it may have been slow only: the next one finds the answer
                return
            self._account.book(ledger_pb2.HOP_CACHE, join.seat.lookup.timing)
            self._account.enter(ledger_pb2.KIND_OVERHEAD)
            if join.seat.role == response_cache_pb2.JOIN_ROLE_HIT:
                self._replay(flight, join.seat.lookup)  # and its readers know that there is an answer
                await join.leave()
            elif join.seat.role == response_cache_pb2.JOIN_ROLE_LEADER or not await self._follow(flight, join):
                await self._lead(flight, join)

    async def _follow(self, flight: Flight, join: Join) -> bool:
        """Take another's chunks; whether that was the whole answer."""
        self._status(COALESCED)
        flight.accept()
        self._account.enter(ledger_pb2.KIND_QUEUE)
        try:
            end = await join.follow(self._means.follow_silence_seconds)
        except CacheLost:
            CACHE_FAILURES.labels("follow").inc()
            end = None
        if end is None:
            return False
        flight.land(Ending(end.finish_reason, end.usage, self.status))
        await join.leave()
        return True

    async def _lead(self, flight: Flight, join: Join) -> None:
        async with join.leading():
            try:
                flight.land(await self._generate(flight))
            except BatonError as error:
                if self._poisonous:
                    flight.fail(error)  # its readers need not wait for the others
                    await join.failed(error)
                raise
            try:
                await join.done(self._answer(flight), self._request.cache_ttl_seconds)
            except CacheLost:
                CACHE_FAILURES.labels("fill").inc()
                self._fill(flight)

    async def _look_up(self, flight: Flight) -> None:
        found = None
        if self._means.cache.enabled and cacheable(self._request):
            self._status(MISS)
            self._account.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_CACHE)
            found = await self._means.cache.lookup(
                response_cache_pb2.LookupRequest(key=self._start.key, question=self._request.question)
            )
            if found is not None:
                self._account.book(ledger_pb2.HOP_CACHE, found.timing)
            self._account.enter(ledger_pb2.KIND_OVERHEAD)
        if found is None or not found.hit:
            raise NotFound("the answer is not in the response cache")
        self._replay(flight, found)

    def _replay(self, flight: Flight, found: response_cache_pb2.LookupResponse) -> None:
        similar = found.HasField("similarity")
        self._status(SEMANTIC if similar else HIT)
        flight.replay(found.answer.chunks)
        self._account.first_token()
        flight.land(
            Ending(
                finish_reason=found.answer.finish_reason,
                usage=found.answer.usage,
                cache_status=self.status,
                cache_similarity=found.similarity if similar else None,
                cache_entry=found.entry,
            )
        )

    async def _generate(self, flight: Flight) -> Ending:
        """Have workers write the rest of the answer, as soon as they have a place for it.

        Raises:
            BatonError: they cannot, or have no place.
        """
        async with self._means.admission.place(self._serving.fingerprint, self._ticket(flight), self._account) as place:
            flight.accept()
            return await self._write(flight, place)

    def _ticket(self, flight: Flight) -> Ticket:
        """The request, as those see it who give places."""
        answer = [*self._request.delivered, *flight.token_ids()]
        ask = ask_of(self._serving.fingerprint, self._request, answer)
        return Ticket(
            tenant=self._tenant,
            priority=self._request.priority,
            prompt_tokens=len(ask.token_ids),
            cached_tokens=self._means.tier.dispatcher.expected_cached(ask),
            max_tokens=max(1, ask.answer_tokens),
            deadline=lambda: self._deadline(flight),
        )

    def _deadline(self, flight: Flight) -> float:
        """Of the most patient reader, on the event loop's clock."""
        return flight.deadline() or asyncio.get_running_loop().time() + self._means.max_request_seconds

    async def _write(self, flight: Flight, place: Place) -> Ending:
        """Have workers write the rest of the answer."""
        while True:
            deadline = self._deadline(flight)
            generation = Generation(
                self._means.tier,
                self._record.request_id,
                replace(self._request, delivered=[*self._request.delivered, *flight.token_ids()]),
                self._serving,
                deadline,
                self._account,
                place.moved,
            )
            try:
                async with aclosing(generation.tokens()) as messages:
                    async for tokens in messages:
                        self._record.arrived(len(tokens.token_ids))
                        place.came(len(tokens.token_ids))
                        flight.push(
                            CachedChunk(
                                token_ids=tokens.token_ids, text=tokens.text, since_start_us=flight.since_start_us()
                            )
                        )
            except DeadlineExceeded:
                # The workers were told the deadline of who was there then; somebody more patient may have come.
                if (flight.deadline() or deadline) <= deadline:
                    raise
                continue
            finally:
                self._poisonous = generation.poisonous
            finished = generation.finished
            assert finished is not None, "a generation without an end raises"
            return Ending(
                finish_reason=finished.finish_reason,
                usage=finished.usage,
                cache_status=self.status,
                prefill_placement=finished.prefill_placement,
                transport=finished.transport,
                migrations=generation.migrations,
                preemptions=finished.preemptions,
            )

    def _fill(self, flight: Flight) -> None:
        request = response_cache_pb2.FillRequest(
            key=self._start.key, answer=self._answer(flight), question=self._request.question
        )
        if self._request.cache_ttl_seconds is not None:
            request.ttl.FromNanoseconds(int(self._request.cache_ttl_seconds * 1e9))
        self._means.cache.fill(request)

    def _answer(self, flight: Flight) -> response_cache_pb2.CachedAnswer:
        assert flight.ending is not None
        return response_cache_pb2.CachedAnswer(
            chunks=flight.log.items, finish_reason=flight.ending.finish_reason, usage=flight.ending.usage
        )

    def _status(self, status: inference_pb2.CacheStatus.ValueType) -> None:
        self.status = status
        self._record.summary.cache_status = status
