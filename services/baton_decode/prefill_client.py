"""Getting a prompt's KV from a prefill service into a reserved slot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
from prometheus_client import Counter, Histogram

from baton.engine.client import EngineClient
from baton.handoff.receiver import KvReceiver
from baton.handoff.wire import WIRE_VERSION, HandoffCorrupt, layer_table
from baton.internal.v1 import decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc, timing_pb2
from baton.rpc.channel import ChannelPool
from baton.telemetry import tracing
from baton.telemetry.tracing import Attribute

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
HANDOFFS.labels("ok")


@dataclass(slots=True)
class Handoff:
    """What a handoff cost. Before the first token, transfer hides behind computation; after it, decode waits for it."""

    accepted_ns: int = 0
    first_chunk_ns: int = 0
    first_token_ns: int = 0
    sending_ns: int = 0  # the sender spent on KV before the first token
    behind_ns: int = 0  # of the wait for the first token, that it spent behind KV on the way
    done_ns: int = 0
    chunks: int = 0
    bytes: int = 0
    progress: timing_pb2.HopTiming = field(default_factory=timing_pb2.HopTiming)  # the sender's last account

    @property
    def hidden_ns(self) -> int:
        """Time in which KV moved while the prompt was still being computed."""
        return self.sending_ns

    @property
    def exposed_ns(self) -> int:
        """Time the request waited for bytes: its first token behind them, and itself from then to the last one."""
        return self.behind_ns + (max(0, self.done_ns - self.first_token_ns) if self.done_ns else 0)

    def first_token(self, token: prefill_pb2.FirstToken) -> None:
        """The first token is here.

        It says how long after PrefillAccepted it was sampled, by the sender's clock. Both messages took the same way,
        so what lies between them here beyond that is waiting in line.
        """
        self.sending_ns = token.sending_ns
        self.first_token_ns = time.monotonic_ns()
        if self.first_chunk_ns and self.accepted_ns:
            self.behind_ns = max(0, self.first_token_ns - self.accepted_ns - token.since_accepted_ns)

    def attributes(self) -> dict[str, Attribute]:
        """For its span."""
        return {
            "baton.handoff.bytes": self.bytes,
            "baton.handoff.chunks": self.chunks,
            "baton.handoff.hidden_ms": self.hidden_ns / 1e6,
            "baton.handoff.exposed_ms": self.exposed_ns / 1e6,
        }


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
    ) -> AsyncGenerator[prefill_pb2.FirstToken | prefill_pb2.Done, None]:
        """Have `token_ids` computed at `target`, and their KV written into `slot`; what it cost goes into `handoff`.

        Yields:
            The first token as soon as it is known, then, when every byte is here and verified, Done. A first token that
            ends the answer comes alone: its KV is not needed.

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
                            handoff.first_chunk_ns = handoff.first_chunk_ns or time.monotonic_ns()
                            if granted := receiver.accept(message.chunk):
                                credits.put_nowait(granted)
                                if receiver.all_granted:
                                    credits.put_nowait(None)
                            handoff.chunks += 1
                        case "progress":
                            handoff.progress = message.progress.timing
                        case "first_token":
                            handoff.first_token(message.first_token)
                            yield message.first_token
                            if message.first_token.finish_reason:
                                needed = False
                                credits.put_nowait(None)
                        case "done" if not needed:
                            HANDOFFS.labels("not_needed").inc()
                            return
                        case "done":
                            receiver.verify(message.done)
                            handoff.done_ns = time.monotonic_ns()
                            HANDOFF_SECONDS.labels("grpc", "hidden").observe(handoff.hidden_ns / 1e9)
                            HANDOFF_SECONDS.labels("grpc", "exposed").observe(handoff.exposed_ns / 1e9)
                            HANDOFFS.labels("ok").inc()
                            yield message.done
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
