"""Getting a prompt's KV from a prefill service into a reserved slot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import grpc
from prometheus_client import Counter, Histogram

from baton.engine.client import EngineClient
from baton.handoff.receiver import KvReceiver
from baton.handoff.wire import WIRE_VERSION, HandoffCorrupt, layer_table
from baton.internal.v1 import decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc
from baton.rpc.channel import ChannelPool, read_status
from baton.telemetry import tracing
from baton_decode.handoff import Handoff

log = logging.getLogger(__name__)

HANDOFF_BYTES = Counter("baton_handoff_bytes_total", "KV bytes received", ["transport"])
HANDOFF_SECONDS = Histogram(
    "baton_handoff_seconds",
    "Time KV moved: hidden behind the prompt's computation, or exposed after the first token",
    ["transport", "part"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
HANDOFFS = Counter("baton_handoffs_total", "Handoffs by outcome", ["outcome"])
HANDOFF_BYTES.labels("grpc")
for _part in ("hidden", "exposed"):
    HANDOFF_SECONDS.labels("grpc", _part)
for _outcome in ("ok", "not_needed", "silent", "corrupt", "unavailable", "deadline_exceeded", "resource_exhausted"):
    HANDOFFS.labels(_outcome)  # a zero is a figure, no data is a question


class PrefillLost(Exception):
    """The prefill service failed, vanished, fell silent, or sent broken KV. Another one, or this worker, can do it."""


class PrefillClient:
    """Runs `Prefill.Prefill` calls.

    Args:
        channels: to the prefill services.
        engine: whose pool receives.
        credit_bytes: KV bytes allowed in flight per request.
        silence: seconds without any message after which the call is given up.
    """

    def __init__(self, channels: ChannelPool, engine: EngineClient, credit_bytes: int, silence: float) -> None:
        self._channels = channels
        self._engine = engine
        self._credit_bytes = credit_bytes
        self._silence = silence
        self._table = layer_table(engine.spec)

    async def fetch(
        self,
        target: str,
        request: decode_pb2.GenerateRequest,
        token_ids: Sequence[int],
        slot: int,
        timeout: float | None,
        handoff: Handoff,
    ) -> AsyncGenerator[prefill_pb2.PrefillProgress | prefill_pb2.FirstToken | prefill_pb2.Done, None]:
        """Have `token_ids` computed at `target`, and their KV written into `slot`; what it cost goes into `handoff`.

        Yields:
            Accounts of the time so far, the first token as soon as it is known, and when every byte is here and
            verified, Done. A first token that ends the answer is the last: its KV is not needed.

        Raises:
            PrefillLost: the slot's content is worthless; whoever owns the slot goes on some other way.
        """
        start = prefill_pb2.Start(
            request_id=request.request_id,
            wire_version=WIRE_VERSION,
            model_fingerprint=self._engine.spec.fingerprint,
            layer_table=self._table,
            token_ids=token_ids,
            prompt_tokens=len(request.token_ids),
            start_token=0,
            sampling=request.sampling,
            credit_bytes=self._credit_bytes,
            codecs=[kv_pb2.KV_CODEC_RAW],
            priority=request.priority,
        )
        receiver = KvReceiver(self._engine.layout, self._engine.memory, slot, 0, len(token_ids), self._credit_bytes)
        # At most one entry per chunk in flight, and those are bounded by the credit.
        credits: asyncio.Queue[int | None] = asyncio.Queue()
        if receiver.all_granted:
            credits.put_nowait(None)
        needed = True
        async with self._channels.channel(target) as channel:
            prefill = prefill_pb2_grpc.PrefillStub(channel).Prefill
            call = tracing.call(
                "baton.internal.v1.Prefill/Prefill", prefill, _requests(start, credits), timeout, target
            )
            messages = aiter(call)
            try:
                while True:
                    async with asyncio.timeout(self._silence):
                        message = await anext(messages, None)
                    if message is None:
                        raise PrefillLost(f"{target} ended the call early")
                    match message.WhichOneof("message"):
                        case "accepted":
                            handoff.accepted_ns = time.monotonic_ns()
                        case "chunk":
                            handoff.chunk(message.chunk.since_accepted_ns, time.monotonic_ns())
                            if granted := receiver.accept(message.chunk):
                                credits.put_nowait(granted)
                                if receiver.all_granted:
                                    credits.put_nowait(None)
                        case "progress":
                            handoff.progress = message.progress.timing
                            yield message.progress
                        case "first_token":
                            handoff.first_token(message.first_token.since_accepted_ns, time.monotonic_ns())
                            yield message.first_token
                            if message.first_token.finish_reason:
                                needed = False
                                credits.put_nowait(None)
                        case "done" if not needed:
                            HANDOFFS.labels("not_needed").inc()
                            await read_status(messages)
                            return
                        case "done":
                            receiver.verify(message.done)
                            handoff.done_ns = time.monotonic_ns()
                            HANDOFF_SECONDS.labels("grpc", "hidden").observe(handoff.hidden_ns / 1e9)
                            HANDOFF_SECONDS.labels("grpc", "exposed").observe(handoff.exposed_ns / 1e9)
                            HANDOFFS.labels("ok").inc()
                            yield message.done
                            await read_status(messages)
                            return
            except TimeoutError:
                HANDOFFS.labels("silent").inc()
                raise PrefillLost(f"{target} said nothing for {self._silence:g} s") from None
            except grpc.aio.AioRpcError as error:
                HANDOFFS.labels(error.code().name.lower()).inc()
                raise PrefillLost(f"{target}: {error.code().name} {error.details()}") from error
            except HandoffCorrupt as error:
                HANDOFFS.labels("corrupt").inc()
                raise PrefillLost(f"{target}: {error}") from error
            finally:
                call.cancel()
                credits.put_nowait(None)  # cancelling a call that is over does not end the task that reads our requests
                handoff.bytes = receiver.received_bytes
                HANDOFF_BYTES.labels("grpc").inc(receiver.received_bytes)


async def _requests(
    start: prefill_pb2.Start, credits: asyncio.Queue[int | None]
) -> AsyncIterator[prefill_pb2.PrefillRequest]:
    """Start, then credits until None, which closes our side.

    The prefill service ends a call only after that: a credit written into a call that has just ended would fail, and
    gRPC would then keep the call for ever if nobody reads it to its end.
    """
    yield prefill_pb2.PrefillRequest(start=start)
    while (size := await credits.get()) is not None:
        yield prefill_pb2.PrefillRequest(credit=prefill_pb2.Credit(bytes=size))
