"""Put the decode service together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from baton.engine.client import EngineClient
from baton.handoff import nixl
from baton.handoff.sources import Sources
from baton.handoff.transport import TransportChoice, TransportFailed
from baton.internal.v1 import decode_pb2_grpc, worker_pb2
from baton.rpc.channel import ChannelPool
from baton.rpc.service import CannotStart, Runtime
from baton.text.tokenizer import ModelFilesError, Tokenizer
from baton.v1 import inference_pb2
from baton.worker.calls import Calls
from baton.worker.engine import running_engine
from baton.worker.servicer import WorkerServicer
from baton.worker.step_meter import StepMeter
from baton.worker.trials import Trials
from baton_decode.decode import DecodeServicer
from baton_decode.placer import Placer
from baton_decode.prefill_client import PrefillClient
from baton_decode.settings import DecodeSettings
from baton_decode.spacing import Spacing, affordable_rate


@asynccontextmanager
async def build(settings: DecodeSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Start the engine, register the servicers; close channels and stop the engine on exit."""
    try:
        tokenizer = Tokenizer.load(settings.model)
    except ModelFilesError as error:
        raise CannotStart(str(error)) from error
    channels = ChannelPool(dialer=runtime.dialer)
    try:
        meter = StepMeter(settings.step_tokens)
        async with running_engine(settings, runtime, meter) as engine, AsyncExitStack() as stack:
            calls = Calls()
            reader = _nixl_reader(settings.transport, engine)
            sources = Sources(engine.memory, settings.shm_dir, reader)
            stack.callback(sources.close)
            prefill = PrefillClient(
                channels,
                engine,
                sources,
                tuple(t for t in settings.transport.transports if reader or t != inference_pb2.TRANSPORT_NIXL),
                settings.kv_codec,
                settings.handoff_credit_bytes,
                settings.prefill_silence_seconds,
            )
            # Counted now: the service runs on the cores it was told to.
            spacing = Spacing(settings.messages_per_second or affordable_rate(len(os.sched_getaffinity(0))))
            placer = Placer(
                settings.placement(),
                settings.threshold(),
                settings.policy(),
                meter,
                engine.layout.bytes_per_token,
            )
            engine.on_report.append(placer.reported)
            trials = Trials(settings.trial_seconds)
            decode = DecodeServicer(engine, tokenizer, prefill, placer, spacing, trials, calls, runtime)
            decode_pb2_grpc.add_DecodeServicer_to_server(decode, runtime.server)
            worker = WorkerServicer(worker_pb2.WORKER_ROLE_DECODE, settings, engine, meter, calls, runtime)
            worker.register(runtime)
            runtime.register("baton.internal.v1.Decode")
            yield
    finally:
        await channels.close()


def _nixl_reader(choice: TransportChoice, engine: EngineClient) -> nixl.Reader | None:
    """What reads by NIXL, where that is allowed and installed.

    Raises:
        CannotStart: nothing else is allowed, and it is not to be had.
    """
    if choice not in (TransportChoice.AUTO, TransportChoice.NIXL):
        return None
    try:
        return nixl.Reader(engine.memory)
    except TransportFailed as error:
        if choice is TransportChoice.NIXL:
            raise CannotStart(f"--transport {choice}: {error}") from None
        return None
