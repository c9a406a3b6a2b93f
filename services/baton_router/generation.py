"""One request's way through the decode tier, over as many workers as it takes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Final

import grpc

from baton.internal.v1 import decode_pb2, decode_pb2_grpc, timing_pb2
from baton.rpc.channel import ChannelPool, read_status
from baton.rpc.errors import DeadlineExceeded, PoisonRequest
from baton.rpc.retry_budget import RetryBudget
from baton.telemetry import tracing
from baton.v1 import ledger_pb2, sampling_pb2
from baton_router.account import Account
from baton_router.catalogue import Serving
from baton_router.dispatch import Ask, Dispatcher, Placed
from baton_router.ending import ending
from baton_router.loss import AttemptLost, Loss, meaning, no_worker_left
from baton_router.metrics import MIGRATIONS, RETRIES_REFUSED
from baton_router.validate import ResolvedRequest
from baton_router.worker import Worker
from baton_router.workers import WorkerView

log = logging.getLogger(__name__)

_VANISHED_TWICE: Final = 2


@dataclass(frozen=True, slots=True)
class Tier:
    """What all requests share: the workers, the ways to them, and how patient we are."""

    view: WorkerView
    channels: ChannelPool
    dispatcher: Dispatcher
    max_migrations: int
    reattach_seconds: float
    deadline_margin_seconds: float
    retries: RetryBudget


def ask_of(fingerprint: str, request: ResolvedRequest, delivered: Sequence[int]) -> Ask:
    """A request as it is placed, after the tokens of its answer that are there."""
    return Ask(
        fingerprint=fingerprint,
        token_ids=[*request.prompt_ids, *delivered],
        answer_tokens=request.sampling.max_tokens - len(delivered),
        salt=request.prefix_salt if request.prefix_cache else None,
    )


class Generation:
    """Runs one request.

    Args:
        tier: the decode tier.
        request_id: of the client's request.
        request: what to generate.
        serving: the model it was tokenized for.
        deadline: on the event loop's clock.
        account: where the time is booked.
        moved: told the incarnation of each decode worker that it goes to.

    Attributes:
        finished: how it ended, once `tokens` is through.
        migrations: times it moved on from a worker that had accepted it.
        poisonous: it breaks the workers it runs on.
    """

    def __init__(
        self,
        tier: Tier,
        request_id: str,
        request: ResolvedRequest,
        serving: Serving,
        deadline: float,
        account: Account,
        moved: Callable[[str], None],
    ) -> None:
        self._moved = moved
        self._tier = tier
        self._request_id = request_id
        self._request = request
        self._serving = serving
        self._deadline = deadline
        self._account = account
        self._delivered = list(request.delivered)
        self._failed: set[str] = set()  # incarnations
        self._gone: dict[str, float] = {}  # of these, those that may only have been out of reach, and when; monotonic
        self._last_loss: AttemptLost | None = None
        self._vanished = 0  # workers that were gone from one moment to the next while they ran it
        self._broke = 0  # workers that broke off with a defect
        self._suspect = False  # an engine died under it: perhaps for its sake
        self.finished: decode_pb2.Finished | None = None
        self.migrations = 0
        self.poisonous = False

    async def tokens(self) -> AsyncGenerator[decode_pb2.Tokens, None]:
        """The answer, indices continuous over all attempts.

        Raises:
            BatonError: nobody can go on, or the deadline passed.
        """
        attempts = 0
        self._tier.retries.request()
        while not self._ended():
            placed = await self._place()
            worker = placed.decode
            self._moved(worker.state.incarnation)
            attempt = Attempt(self._tier, placed, self._account)
            before = len(self._delivered)
            try:
                async with aclosing(attempt.run(self._decode_request(), self._timeout())) as messages:
                    async for tokens in messages:
                        self._deliver(tokens)
                        yield tokens
                self.finished = attempt.finished
            except AttemptLost as lost:
                # Workers that come and go may do so as often as they like, as long as it gets further.
                attempts += lost.loss is not Loss.GONE or len(self._delivered) == before
                self._give_up_on(worker, lost, attempt.accepted)
                if attempts > self._tier.max_migrations:
                    raise no_worker_left(lost) from lost
            except PoisonRequest:
                self.poisonous = True
                raise

    def _ended(self) -> bool:
        """Whether nothing is missing: a worker said so, or what was delivered does."""
        if self.finished is not None:
            return True
        sampling = self._request.sampling
        tokenizer, eos = self._serving.model.tokenizer, self._serving.eos_token_ids
        reason = ending(tokenizer, self._request.prompt_ids, self._delivered, sampling, eos)
        if reason is not None:
            usage = sampling_pb2.Usage(
                prompt_tokens=len(self._request.prompt_ids), completion_tokens=len(self._delivered)
            )
            self.finished = decode_pb2.Finished(finish_reason=reason, usage=usage)
        return reason is not None

    def _deliver(self, tokens: decode_pb2.Tokens) -> None:
        if tokens.index != len(self._delivered):
            raise AttemptLost(Loss.BROKEN, f"token {tokens.index} instead of {len(self._delivered)}")
        self._delivered += tokens.token_ids
        if tokens.token_ids:
            self._account.first_token(tokens.timing if tokens.HasField("timing") else None)

    async def _place(self) -> Placed:
        """The workers it goes to; waits a moment for a decode worker that may come back."""
        view = self._tier.view
        loop = asyncio.get_running_loop()
        end = min(loop.time() + self._tier.reattach_seconds, self._deadline)
        ask = ask_of(self._serving.fingerprint, self._request, self._delivered)
        while True:
            placed = self._tier.dispatcher.place(ask, self._failed)
            placed = placed or self._tier.dispatcher.place(ask, self._failed - self._back())
            if placed is not None:
                return placed
            waits = self._last_loss is None or self._last_loss.loss in (Loss.GONE, Loss.CRASHED)
            if not waits or loop.time() >= end:
                raise no_worker_left(self._last_loss)
            self._account.enter(ledger_pb2.KIND_QUEUE)
            await view.wait_change(end - loop.time())

    def _back(self) -> set[str]:
        """Workers that were gone for this request, and have said something since."""
        told = {worker.state.incarnation: worker.told for worker in self._tier.view.workers()}
        return {incarnation for incarnation, when in self._gone.items() if told.get(incarnation, 0.0) > when}

    def _decode_request(self) -> decode_pb2.GenerateRequest:
        return decode_pb2.GenerateRequest(
            # Two clients may choose the same id, and a lost attempt may still be ending: workers need one of its own.
            request_id=f"{self._request_id}.{secrets.token_hex(4)}",
            model_fingerprint=self._serving.fingerprint,
            token_ids=self._request.prompt_ids,
            delivered_token_ids=self._delivered,
            sampling=self._request.sampling,
            priority=self._request.priority,
            cache_salt=self._request.prefix_salt,
            bypass_prefix_cache=not self._request.prefix_cache,
            suspect=self._suspect,
        )

    def _timeout(self) -> float:
        """Seconds decode may take: a little less than is left, so that its answer to a deadline still gets through."""
        left = self._deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed")
        return left - min(self._tier.deadline_margin_seconds, left / 2)

    def _give_up_on(self, worker: Worker, lost: AttemptLost, accepted: bool) -> None:
        match lost.loss:
            case Loss.BROKEN:
                self._broke += 1
                self._suspect = True
                if self._broke >= 2:
                    # What breaks two workers will break the next.
                    self.poisonous = True
                    raise PoisonRequest from lost
            case Loss.CRASHED:
                self._suspect = True
            case Loss.GONE if accepted:
                # Workers are stopped and restarted; but a request may also take its worker's memory, front and all.
                self._vanished += 1
                self._suspect = self._suspect or self._vanished >= _VANISHED_TWICE
        if lost.loss in (Loss.FULL, Loss.UNFIT, Loss.BROKEN) and not self._tier.retries.spend():
            RETRIES_REFUSED.inc()
            raise no_worker_left(lost) from lost
        self._failed.add(worker.state.incarnation)
        if lost.loss is Loss.GONE:
            self._gone[worker.state.incarnation] = time.monotonic()
        self._last_loss = lost
        if accepted:
            self.migrations += 1
            MIGRATIONS.inc()
        log.warning("decode %s lost a request: %s", worker.target, lost, extra={"request_id": self._request_id})


class Attempt:
    """One call of one decode worker.

    Attributes:
        accepted: whether the worker had taken the request.
        finished: its last word, if it came to that.
    """

    def __init__(self, tier: Tier, placed: Placed, account: Account) -> None:
        self._tier = tier
        self._placed = placed
        self._worker = placed.decode
        self._account = account
        self.accepted = False
        self.finished: decode_pb2.Finished | None = None
        self._timing: timing_pb2.HopTiming | None = None  # the worker's last account

    async def run(self, request: decode_pb2.GenerateRequest, timeout: float) -> AsyncGenerator[decode_pb2.Tokens, None]:
        """The worker's tokens. Leaving early cancels the call, and with it everything below.

        Raises:
            AttemptLost: another worker may go on.
            BatonError: the client's status.
        """
        self._account.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_DECODE)
        with ExitStack() as stack:
            computed = stack.enter_context(self._placed.holding())
            request.prefill_candidates.extend(self._placed.candidates)
            async with self._tier.channels.channel(self._worker.target) as channel:
                generate = decode_pb2_grpc.DecodeStub(channel).Generate
                call = tracing.call(
                    "baton.internal.v1.Decode/Generate", generate, request, timeout, self._worker.target
                )
                stack.callback(call.cancel)
                stack.enter_context(self._worker.running(call))
                messages = aiter(call)
                try:
                    async for message in messages:
                        match message.WhichOneof("event"):
                            case "accepted":
                                self.accepted = True
                                self._timing = message.accepted.timing
                            case "progress":
                                self._timing = message.progress.timing
                            case "tokens":
                                computed()
                                if message.tokens.HasField("timing"):
                                    self._timing = message.tokens.timing
                                if message.tokens.token_ids or message.tokens.text:
                                    yield message.tokens
                            case "finished":
                                self.finished = message.finished
                                self._timing = message.finished.timing
                                await read_status(messages)
                                return
                except grpc.aio.AioRpcError as error:
                    raise meaning(error) from error
                except asyncio.CancelledError:
                    # A call cancelled by the worker view raises this too; nobody cancelled us then.
                    task = asyncio.current_task()
                    if self._worker.hung and task is not None and not task.cancelling():
                        raise AttemptLost(Loss.GONE, "silent") from None
                    raise
                finally:
                    # However it ended: what the worker last told is known, and the rest was waiting for it.
                    if self._timing is not None:
                        self._account.book(ledger_pb2.HOP_DECODE, self._timing)
                    self._account.enter(ledger_pb2.KIND_OVERHEAD)
        raise AttemptLost(Loss.BROKEN, "the stream ended early")
