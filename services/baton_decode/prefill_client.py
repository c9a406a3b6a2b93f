"""Getting a prompt's KV from a prefill service into a reserved slot."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
from prometheus_client import Counter, Histogram

from baton.engine.client import EngineClient
from baton.handoff import transport
from baton.handoff.cost import Handoff
from baton.handoff.encoding import Message, deserialize
from baton.handoff.receiver import KvReceiver
from baton.handoff.reception import NoTransport, Reception
from baton.handoff.sources import Sources
from baton.handoff.transport import Transport
from baton.handoff.wire import WIRE_VERSION, Chunk, HandoffCorrupt, largest_chunk, layer_table
from baton.internal.v1 import decode_pb2, prefill_pb2
from baton.rpc.channel import ChannelPool, read_status
from baton.rpc.errors import FailedPrecondition, is_crash
from baton.rpc.patience import patience
from baton.telemetry import tracing
from baton.v1 import inference_pb2
from baton_decode.links import KvCodecChoice, Links

log = logging.getLogger(__name__)

HANDOFF_BYTES = Counter("baton_handoff_bytes_total", "KV bytes received", ["transport"])
HANDOFF_SECONDS = Histogram(
    "baton_handoff_seconds",
    "Time KV moved: hidden behind the prompt's computation, or exposed after the first token",
    ["transport", "part"],
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
HANDOFFS = Counter("baton_handoffs_total", "Handoffs by outcome", ["outcome"])
# A zero is a figure, no data is a question.
for _transport in transport.FASTEST_FIRST:
    HANDOFF_BYTES.labels(transport.name(_transport))
    for _part in ("hidden", "exposed"):
        HANDOFF_SECONDS.labels(transport.name(_transport), _part)
for _outcome in (
    "ok", "not_needed", "silent", "corrupt", "no_transport", "unavailable", "deadline_exceeded", "resource_exhausted"
):  # fmt: skip
    HANDOFFS.labels(_outcome)


class PrefillLost(Exception):
    """The prefill service failed, vanished, fell silent, or sent broken KV. Another one, or this worker, can do it.

    Attributes:
        crashed: its engine died or failed while it computed, for which this prompt may be the reason.
    """

    def __init__(self, message: str, *, crashed: bool = False) -> None:
        super().__init__(message)
        self.crashed = crashed


class PrefillClient:
    """Runs `Prefill.Prefill` calls.

    Args:
        channels: to the prefill services.
        engine: whose pool receives.
        sources: the pools that can be read from here.
        transports: allowed, the most wanted first.
        codec: of KV that comes in the call.
        credit_bytes: KV bytes allowed in flight per request, at most.
        silence: seconds without any message after which the call is given up.
    """

    def __init__(
        self,
        channels: ChannelPool,
        engine: EngineClient,
        sources: Sources,
        transports: tuple[Transport, ...],
        codec: KvCodecChoice,
        credit_bytes: int,
        silence: float,
    ) -> None:
        self._channels = channels
        self._engine = engine
        self._sources = sources
        self._transports = transports
        self._codec = codec
        self._credit_bytes = credit_bytes
        self._silence = silence
        self._table = layer_table(engine.spec)
        self._links = Links()

    async def fetch(
        self,
        target: str,
        request: decode_pb2.GenerateRequest,
        token_ids: Sequence[int],
        slot: int,
        start_token: int,
        timeout: float | None,
        handoff: Handoff,
    ) -> AsyncGenerator[prefill_pb2.PrefillProgress | prefill_pb2.FirstToken | prefill_pb2.Done, None]:
        """Have `token_ids` computed at `target`, and their KV brought into `slot`; what it cost goes into `handoff`.

        Args:
            target: gRPC name of the prefill service.
            request: of the router.
            token_ids: the prompt, and tokens delivered already.
            slot: reserved.
            start_token: the KV of tokens [0, start_token) is in the slot already, and stays as it is.
            timeout: seconds.
            handoff: filled in.

        Yields:
            Accounts of the time so far, the first token as soon as it is known, and when every byte is here and
            verified, and was held until then, Done. A first token that ends the answer is the last: its KV is not
            needed.

        Raises:
            PrefillLost: what is in the slot behind `start_token` is worthless; whoever owns it goes on some other way.
            FailedPrecondition: no transport that both sides allow works between them.
        """
        codecs = self._links.codecs(self._codec, target)
        transports = self._links.transports(self._transports, target, time.monotonic())
        credit_bytes = max(self._links.credit(target, self._credit_bytes), largest_chunk(self._engine.layout))
        start = prefill_pb2.Start(
            request_id=request.request_id,
            wire_version=WIRE_VERSION,
            model_fingerprint=self._engine.spec.fingerprint,
            layer_table=self._table,
            token_ids=token_ids,
            prompt_tokens=len(request.token_ids),
            start_token=start_token,
            sampling=request.sampling,
            credit_bytes=credit_bytes,
            codecs=codecs,
            priority=request.priority,
            cache_salt=request.cache_salt,
            bypass_prefix_cache=request.bypass_prefix_cache,
            transports=transports,
            mapped_memory=self._mapped(target, transports),
        )
        layout, memory = self._engine.layout, self._engine.memory
        receiver = KvReceiver(layout, memory, slot, start_token, len(token_ids), credit_bytes, codecs)
        reception = Reception(receiver, self._sources, transports, handoff)
        needed = True
        async with self._channels.channel(target) as channel:
            call = tracing.call(
                "baton.internal.v1.Prefill/Prefill", _prefill(channel), reception.requests(start), timeout, target
            )
            messages = aiter(call)
            try:
                while True:
                    async with patience(self._silence):
                        message = await anext(messages, None)
                    if message is None:
                        raise PrefillLost(f"{target} ended the call early")
                    if isinstance(message, Chunk):
                        reception.chunk(message)
                        continue
                    match message.WhichOneof("message"):
                        case "accepted":
                            await reception.accepted(message.accepted)
                        case "ranges" if needed:
                            if await reception.ranges(message.ranges):
                                done = message.ranges.sent
                                break
                        case "progress":
                            handoff.progress = message.progress.timing
                            yield message.progress
                        case "first_token":
                            handoff.first_token(message.first_token.since_accepted_ns, time.monotonic_ns())
                            yield message.first_token
                            if message.first_token.finish_reason:
                                needed = False
                                reception.close()
                        case "done" if not needed:
                            HANDOFFS.labels("not_needed").inc()
                            await read_status(messages)
                            return
                        case "done":
                            receiver.verify(message.done)
                            done = message.done
                            break
                handoff.done_ns = time.monotonic_ns()
                self._account(target, handoff, receiver.received_bytes)
                yield done
                await read_status(messages)
            except TimeoutError:
                HANDOFFS.labels("silent").inc()
                raise PrefillLost(f"{target} said nothing for {self._silence:g} s") from None
            except grpc.aio.AioRpcError as error:
                HANDOFFS.labels(error.code().name.lower()).inc()
                raise PrefillLost(
                    f"{target}: {error.code().name} {error.details()}", crashed=is_crash(error)
                ) from error
            except HandoffCorrupt as error:
                HANDOFFS.labels("corrupt").inc()
                raise PrefillLost(f"{target}: {error}") from error
            except NoTransport as error:
                HANDOFFS.labels("no_transport").inc()
                if handoff.transport != inference_pb2.TRANSPORT_UNSPECIFIED:
                    raise PrefillLost(f"{target}: {error}") from error  # it worked until now
                raise FailedPrecondition(f"between this worker and {target} {error}") from error
            finally:
                call.cancel()
                reception.close()  # cancelling a call that is over does not end the task that reads our requests
                if reception.memory:
                    self._links.read_from(target, reception.memory)
                for failed in reception.failed:
                    self._links.failed(target, failed, time.monotonic())
                handoff.bytes = receiver.received_bytes
                if handoff.bytes:
                    HANDOFF_BYTES.labels(transport.name(handoff.transport)).inc(handoff.bytes)

    def _mapped(self, target: str, transports: Sequence[Transport]) -> str:
        """The target's pool, if it can be read at once; else empty."""
        memory = self._links.memory(target)
        return memory if inference_pb2.TRANSPORT_SHM in transports and self._sources.mapped(memory) else ""

    def _account(self, target: str, handoff: Handoff, size: int) -> None:
        """A handoff ended well."""
        if handoff.transport == inference_pb2.TRANSPORT_GRPC:
            self._links.moved(target, size, handoff.moved_ns)
        name = transport.name(handoff.transport)
        HANDOFF_SECONDS.labels(name, "hidden").observe(handoff.hidden_ns / 1e9)
        HANDOFF_SECONDS.labels(name, "exposed").observe(handoff.exposed_ns / 1e9)
        HANDOFFS.labels("ok").inc()


def _prefill(channel: grpc.aio.Channel) -> Callable[..., grpc.aio.StreamStreamCall[Any, Message]]:
    """The generated stub's method, but KV comes in without being copied twice more."""
    return channel.stream_stream(
        "/baton.internal.v1.Prefill/Prefill",
        request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
        response_deserializer=deserialize,
    )
