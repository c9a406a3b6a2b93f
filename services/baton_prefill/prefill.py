"""The life of a request in the prefill tier, top to bottom.

1. `Start` arrives: version, model and layer table are compared before anything is computed.
2. The prompt joins the engine's queue; `PrefillAccepted` goes out.
3. The engine looks up what of it is in its prefix cache, and computes the rest in chunks. What is there can be sent at
   once. After each layer of each chunk it says which tokens are ready. While the next layer computes, the sender
   streams them, as far as the caller's credit reaches, or says where they lie: as the caller chose.
4. The first token is sampled and overtakes all KV still queued.
5. When all is out and the caller, who has all KV or has granted credit for it, has closed its side, `Done` follows and
   the call ends. Whatever way it ends, leaving the `async with` frees the prompt's KV: here and nowhere else. Its lease
   ends just before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton.engine.client import EngineClient, EngineDied, RequestHandle
from baton.engine.messages import Failed, KvReady, Output, Progress, Role, Submit
from baton.handoff import transport
from baton.handoff.encoding import Message, serialize
from baton.handoff.sender import STALL_SECONDS, CallerLeft, CallerSilent, KvSender
from baton.handoff.wire import WIRE_VERSION, largest_chunk, layer_table
from baton.internal.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc
from baton.rpc.errors import (
    FailedPrecondition,
    FingerprintMismatch,
    InvalidArgument,
    Unavailable,
    WorkerLost,
)
from baton.rpc.interceptor import current_request_id
from baton.rpc.patience import patience
from baton.rpc.service import Runtime
from baton.rpc.start import receive_start
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.telemetry.tracing import Attribute
from baton.v1 import inference_pb2, ledger_pb2
from baton.worker.calls import Calls
from baton.worker.engine import QUEUE_SECONDS, engine_error
from baton.worker.engine_time import TELL_SECONDS, EngineTime, trace_chunks
from baton.worker.sampling import FINISH_REASONS, engine_sampling
from baton_prefill.lending import Offers

_CODECS = (kv_pb2.KV_CODEC_RAW, kv_pb2.KV_CODEC_INT8)


class PrefillServicer(prefill_pb2_grpc.PrefillServicer):
    """Computes prompts and streams their KV."""

    def __init__(self, engine: EngineClient, offers: Offers, calls: Calls, runtime: Runtime) -> None:
        self._engine = engine
        self._offers = offers
        self._calls = calls
        self._runtime = runtime
        self._table = layer_table(engine.spec)

    def register(self, server: grpc.aio.Server) -> None:
        """As the generated `add_PrefillServicer_to_server`, but KV goes out without being copied twice more."""
        handler = grpc.stream_stream_rpc_method_handler(
            self.Prefill,
            request_deserializer=prefill_pb2.PrefillRequest.FromString,
            response_serializer=serialize,
        )
        name = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Prefill": handler}),))

    async def Prefill(  # type: ignore[override]  # chunks are serialized here
        self,
        request_iterator: AsyncIterator[prefill_pb2.PrefillRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Message]:
        """Serve one prompt."""
        timeline = Timeline(ledger_pb2.HOP_PREFILL)
        start = (await receive_start(request_iterator)).start
        current_request_id.set(start.request_id)
        self._check(start)
        submit = Submit(
            request_id=start.request_id,
            role=Role.PREFILL,
            token_ids=list(start.token_ids),
            num_prompt_tokens=start.prompt_tokens,
            sampling=engine_sampling(start.sampling),
            start_token=start.start_token,
            priority=start.priority,
            prefix_cache=not start.bypass_prefix_cache,
            cache_salt=start.cache_salt,
        )
        with self._calls.track(start.request_id):
            # Left in this order: nobody feeds or listens, the lease ends, the slot is freed.
            async with self._begun(submit) as handle:
                with self._offers.to(start.transports, start.mapped_memory) as accepted:
                    sender = self._sender(start, accepted)
                    feed, listen = _feed(handle, sender, timeline), _listen(request_iterator, sender, accepted)
                    async with _running(sender, feed, listen):
                        with tracing.phase("kv send") as span:
                            try:
                                async for message in sender.messages():
                                    # One that the caller does not take in time ends the call as a cancelled one: the
                                    # rim is cancelled in its write, and no status would get past the message.
                                    async with patience(STALL_SECONDS):
                                        yield message
                            except CallerLeft:
                                raise InvalidArgument(
                                    "choice", "no transport or too little credit when the caller closed"
                                ) from None
                            except CallerSilent as error:
                                raise Unavailable(str(error)) from None
                            finally:
                                span.set(_attributes(sender))
        yield prefill_pb2.PrefillResponse(done=sender.done())

    @asynccontextmanager
    async def _begun(self, submit: Submit) -> AsyncIterator[RequestHandle]:
        """The request in the engine. One that died before it had it says nothing about the request."""
        try:
            async with self._engine.request(submit) as handle:
                yield handle
        except EngineDied as error:
            raise Unavailable(str(error), retry_after=0.0) from error  # later ones end in the feed

    def _sender(self, start: prefill_pb2.Start, accepted: prefill_pb2.PrefillAccepted) -> KvSender:
        """What sends the prompt's KV, PrefillAccepted first."""
        codec = next(codec for codec in start.codecs if codec in _CODECS)
        sender = KvSender(self._engine.layout, self._engine.memory, len(start.token_ids), start.credit_bytes, codec)
        sender.control(prefill_pb2.PrefillResponse(accepted=accepted))
        if not transport.needs_choice(accepted.transports):
            sender.choose(inference_pb2.TRANSPORT_GRPC)
        elif accepted.chosen:
            sender.choose(accepted.chosen)
        return sender

    def _check(self, start: prefill_pb2.Start) -> None:
        """Refuse what does not fit before a byte moves."""
        if self._runtime.draining.is_set():
            raise Unavailable("this prefill worker is draining")
        if start.wire_version != WIRE_VERSION:
            raise FailedPrecondition(f"wire version {start.wire_version} is not {WIRE_VERSION}")
        if start.model_fingerprint != self._engine.spec.fingerprint:
            raise FingerprintMismatch(
                f"the caller runs model {start.model_fingerprint}, this worker {self._engine.spec.fingerprint}"
            )
        if start.layer_table != self._table:
            raise FingerprintMismatch("the caller's layer table is not this worker's")
        if kv_pb2.KV_CODEC_RAW not in start.codecs:
            raise FailedPrecondition("the caller does not take KV_CODEC_RAW")
        if not start.token_ids:
            raise InvalidArgument("token_ids", "must not be empty")
        if start.start_token >= len(start.token_ids):
            raise InvalidArgument("start_token", f"must be below the number of tokens, {len(start.token_ids)}")
        if start.credit_bytes < (largest := largest_chunk(self._engine.layout)):
            raise InvalidArgument("credit_bytes", f"must hold one chunk, {largest} bytes")


@asynccontextmanager
async def _running(sender: KvSender, *feeding: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run what feeds the sender as long as the block lasts."""
    tasks = [asyncio.create_task(coroutine) for coroutine in feeding]
    for task in tasks:
        task.add_done_callback(sender.fail_with)  # or an unexpected error would leave the caller waiting
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _attributes(sender: KvSender) -> dict[str, Attribute]:
    """Of the span."""
    return {
        "baton.transport": transport.name(sender.transport),
        "baton.handoff.bytes": sender.digest.bytes,
        "baton.handoff.chunks": sender.digest.chunks,
    }


async def _feed(handle: RequestHandle, sender: KvSender, timeline: Timeline) -> None:
    """Pass the engine's events to the sender until the first token, which comes last."""
    engine_time = EngineTime(timeline, ledger_pb2.HOP_PREFILL)
    accepted_ns = told_ns = sender.began_ns
    queued = True
    try:
        while True:
            with engine_time.waiting():
                event = await handle.next(TELL_SECONDS)
            if isinstance(event, Progress | Output):
                engine_time.book(event)
                if queued:
                    queued = False
                    # The engine may be quicker than this process.
                    began_ns = max(accepted_ns, event.chunks[0].start_ns) if event.chunks else accepted_ns
                    tracing.record("queue", accepted_ns, began_ns)
                    QUEUE_SECONDS.observe((began_ns - accepted_ns) / 1e9)
                trace_chunks(event)
            if isinstance(event, KvReady):
                engine_time.began()
                sender.ready(event.slot, event.layer, event.start, event.stop)
            elif isinstance(event, Output):
                first = prefill_pb2.FirstToken(
                    token_id=event.token_ids[0],
                    timing=timeline.timing(),
                    since_accepted_ns=sender.since_began_ns(),
                    cached_tokens=event.cached_tokens,
                )
                tracing.set_call_attributes({"baton.prefix_cache.hit_tokens": event.cached_tokens})
                if event.finish_reason is not None:
                    # The answer is one token long: nobody will read the KV.
                    first.finish_reason = FINISH_REASONS[event.finish_reason]
                    sender.drop_queued()
                sender.control(prefill_pb2.PrefillResponse(first_token=first))
                timeline.enter(ledger_pb2.KIND_TRANSFER)
                sender.finish()
                return
            elif isinstance(event, Failed):
                sender.fail(engine_error(event))
                return
            if (now := time.monotonic_ns()) - told_ns >= TELL_SECONDS * 1e9:
                told_ns = now
                progress = prefill_pb2.PrefillProgress(timing=engine_time.so_far())
                sender.control(prefill_pb2.PrefillResponse(progress=progress))
    except EngineDied as error:
        sender.fail(WorkerLost(str(error)))


async def _listen(
    requests: AsyncIterator[prefill_pb2.PrefillRequest], sender: KvSender, accepted: prefill_pb2.PrefillAccepted
) -> None:
    """Pass choices and credits on until the caller closes its side. A lost caller cancels the call itself."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "credit":
                sender.credit(request.credit.bytes)
            case "choice" if request.choice.transport in accepted.transports and transport.needs_choice(
                accepted.transports
            ):
                sender.choose(request.choice.transport)
            case "choice":
                sender.fail(InvalidArgument("choice", "was not offered"))
                return
            case _:
                sender.fail(InvalidArgument("start", "came twice"))
                return
    sender.close()
