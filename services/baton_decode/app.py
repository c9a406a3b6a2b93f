"""Put the decode service together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.internal.v1 import decode_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.rpc.channel import ChannelPool
from baton.rpc.service import CannotStart, Runtime
from baton.text.tokenizer import ModelFilesError, Tokenizer
from baton.worker.calls import Calls
from baton.worker.engine import running_engine
from baton.worker.servicer import WorkerServicer
from baton_decode.decode import DecodeServicer
from baton_decode.prefill_client import PrefillClient
from baton_decode.settings import DecodeSettings


@asynccontextmanager
async def build(settings: DecodeSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Start the engine, register the servicers; close channels and stop the engine on exit."""
    try:
        tokenizer = Tokenizer.load(settings.model)
    except ModelFilesError as error:
        raise CannotStart(str(error)) from error
    channels = ChannelPool()
    try:
        async with running_engine(settings, runtime) as engine:
            calls = Calls()
            prefill = PrefillClient(channels, engine, settings.handoff_credit_bytes, settings.prefill_silence_seconds)
            decode = DecodeServicer(engine, tokenizer, prefill, settings.local_prefill_tokens, calls, runtime)
            decode_pb2_grpc.add_DecodeServicer_to_server(decode, runtime.server)
            worker = WorkerServicer(worker_pb2.WORKER_ROLE_DECODE, settings.served_name(), engine, calls, runtime)
            worker_pb2_grpc.add_WorkerServicer_to_server(worker, runtime.server)
            runtime.register("baton.internal.v1.Decode")
            runtime.register("baton.internal.v1.Worker")
            yield
    finally:
        await channels.close()
