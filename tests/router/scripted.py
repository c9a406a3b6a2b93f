"""A decode worker that follows a script: no engine, but real gRPC. And a scripted cache service."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from baton.internal.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    response_cache_pb2,
    response_cache_pb2_grpc,
    timing_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from baton.rpc.channel import SERVER_OPTIONS
from baton.rpc.errors import BatonError, PoisonRequest, Unavailable, WorkerLost
from baton.rpc.interceptor import RimInterceptor
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton.worker.digests import BlockDigests
from baton.worker.protocol import PROTOCOL
from baton.worker.trials import Blame, Trial, Trials

MS = 1_000_000


def token_at(position: int) -> int:
    """The scripted model: its token at a position of the answer."""
    return 40 + position % 20


def text_at(position: int) -> str:
    return f"{position} "


class ScriptedWorker(worker_pb2_grpc.WorkerServicer, decode_pb2_grpc.DecodeServicer):
    """Serves Watch and Generate.

    Attributes:
        fail: status of the next calls instead of an answer.
        error: raised where `fail` would strike, instead.
        poison: of a prompt that begins with it the engine dies, and takes along what it computes; its
            suspects are tried one at a time.
        fail_after: tokens after which `fail` strikes; 0: at once.
        finish_first: with `fail`: everything but the last word comes.
        hang_after: tokens after which the worker says nothing more, on any stream.
        pause: seconds between tokens.
        gate: while it is not set, requests wait before their first token.
        text: of every token; empty: its number.
        requests: all it got.
        live: calls running now.
        cached: salts and prefixes it says its prefix cache holds.
        skip_sequence: whether the next word of these gets lost.
        prefix_keys: of every Watch that asked for them.
    """

    def __init__(self, tokenizer_digest: str, role: worker_pb2.WorkerRole.ValueType) -> None:
        self.state = worker_pb2.WatchResponse(
            role=role,
            incarnation=uuid.uuid4().hex,
            model=worker_pb2.WorkerModel(
                name="little",
                fingerprint="model-1",
                tokenizer_digest=tokenizer_digest,
                max_context=128,
                vocab_size=420,
                eos_token_ids=[7],
                dtype="float32",
            ),
            capacity=worker_pb2.Capacity(kv_tokens=4096, slots=32),
            protocol=PROTOCOL,
        )
        self.address = ""
        self.fail: grpc.StatusCode | None = None
        self.error: BatonError | None = None
        self.poison: int | None = None
        self.trials = Trials(10.0)
        self.dead = asyncio.Event()
        self.cut = asyncio.Event()  # calls that run are UNAVAILABLE, while the worker lives
        self.fail_after = 0
        self.finish_first = False
        self.hang_after: int | None = None
        self.hanging = asyncio.Event()
        self.pause = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.text = ""
        self.requests: list[decode_pb2.GenerateRequest] = []
        self.live = 0
        self.cached: list[tuple[bytes, list[int]]] = []
        self.skip_sequence = False
        self.prefix_keys: list[bytes] = []
        self._server: grpc.aio.Server | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        model: Path,
        *,
        listen: str = "127.0.0.1:0",
        role: worker_pb2.WorkerRole.ValueType = worker_pb2.WORKER_ROLE_DECODE,
        change: Callable[[ScriptedWorker], None] = lambda worker: None,
    ) -> AsyncIterator[ScriptedWorker]:
        worker = cls(Tokenizer.load(model).digest, role)
        change(worker)
        server = grpc.aio.server(interceptors=[RimInterceptor()], options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        decode_pb2_grpc.add_DecodeServicer_to_server(worker, server)
        port = server.add_insecure_port(listen)
        worker.address = f"127.0.0.1:{port}"
        worker._server = server
        await server.start()
        try:
            yield worker
        finally:
            await server.stop(0)

    async def kill(self) -> None:
        """End all connections at once."""
        assert self._server is not None
        await self._server.stop(0)

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[worker_pb2.WatchResponse, None]:
        if request.prefix_key:
            self.prefix_keys.append(request.prefix_key)
        told: set[int] = set()
        sequence = 0
        while True:
            state = worker_pb2.WatchResponse()
            state.CopyFrom(self.state)
            held = self._blocks(request.prefix_key) if request.prefix_key else []
            if request.prefix_key and (not sequence or told != set(held)):
                sequence += 1 + self.skip_sequence
                self.skip_sequence = False
                state.prefixes.CopyFrom(
                    worker_pb2.PrefixChanges(
                        sequence=sequence,
                        snapshot=sequence == 1,
                        block_tokens=16,
                        added=[block for block in held if block not in told],
                        removed=told - set(held),
                    )
                )
                told = set(held)
            if not self.hanging.is_set():
                yield state
            await asyncio.sleep(0.02)

    def _blocks(self, key: bytes) -> list[int]:
        digests = BlockDigests(key)
        return list(dict.fromkeys(b for salt, tokens in self.cached for b in digests.chain(salt, tokens, 16)))

    async def Generate(
        self, request: decode_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[decode_pb2.GenerateResponse, None]:
        self.requests.append(request)
        self.live += 1
        stack = contextlib.ExitStack()
        trial: Trial | None = None
        try:
            if self.error is not None:
                raise self.error
            if request.suspect:
                trial = stack.enter_context(self.trials.suspect(len(request.delivered_token_ids)))
                await trial.turn.wait()
            if request.token_ids[0] == self.poison:
                self.dead.set()
            if self.fail is not None and self.fail_after == 0 and not self.finish_first:
                await context.abort(self.fail, "scripted")
            yield decode_pb2.GenerateResponse(accepted=decode_pb2.Accepted())
            await self.gate.wait()
            first = len(request.delivered_token_ids)
            for i in range(first, request.sampling.max_tokens):
                if self.hang_after is not None and i - first >= self.hang_after:
                    self.hanging.set()
                    await asyncio.sleep(3600)
                if self.fail is not None and i - first >= self.fail_after and not self.finish_first:
                    await context.abort(self.fail, "scripted")
                if self.pause:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.dead.wait(), self.pause)
                if self.cut.is_set():
                    raise Unavailable("cut off")
                if self.dead.is_set():
                    raise {
                        Blame.GUILTY: PoisonRequest(),
                        Blame.SUSPECT: WorkerLost("the engine died"),
                        Blame.NONE: Unavailable("the engine died"),
                    }[self.trials.blame(trial, computed=True)]
                if trial is not None:
                    self.trials.got(trial, 1, finished=i + 1 == request.sampling.max_tokens)
                tokens = decode_pb2.Tokens(index=i, token_ids=[token_at(i)], text=self.text or text_at(i))
                if i == first:
                    tokens.timing.CopyFrom(_timing(3 * MS))
                yield decode_pb2.GenerateResponse(tokens=tokens)
            if self.fail is not None:
                await context.abort(self.fail, "scripted")
            yield decode_pb2.GenerateResponse(
                finished=decode_pb2.Finished(
                    finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
                    usage=sampling_pb2.Usage(
                        prompt_tokens=len(request.token_ids), completion_tokens=request.sampling.max_tokens
                    ),
                    prefill_placement=inference_pb2.PLACEMENT_LOCAL,
                    timing=_timing(4 * MS),
                )
            )
        finally:
            stack.close()
            self.live -= 1

    async def DebugState(
        self, request: worker_pb2.DebugStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DebugStateResponse:
        return worker_pb2.DebugStateResponse()


def _timing(total: int) -> timing_pb2.HopTiming:
    """Mostly computing; half a millisecond unaccounted for."""
    compute = timing_pb2.TimingEntry(
        hop=ledger_pb2.HOP_DECODE, kind=ledger_pb2.KIND_COMPUTE, duration_ns=total - MS // 2
    )
    return timing_pb2.HopTiming(total_ns=total, entries=[compute])


class ScriptedCache(response_cache_pb2_grpc.ResponseCacheServicer):
    """A cache in a dictionary.

    Attributes:
        delay: seconds a lookup takes.
        broken: whether all calls fail.
        status: how they fail.
        stored: fills by serialized key.
    """

    def __init__(self) -> None:
        self.address = ""
        self.delay = 0.0
        self.broken = False
        self.status = grpc.StatusCode.INTERNAL
        self.lookups = 0
        self.stored: dict[bytes, response_cache_pb2.FillRequest] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls) -> AsyncIterator[ScriptedCache]:
        cache = cls()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        response_cache_pb2_grpc.add_ResponseCacheServicer_to_server(cache, server)
        cache.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield cache
        finally:
            await server.stop(0)

    async def Lookup(
        self, request: response_cache_pb2.LookupRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> response_cache_pb2.LookupResponse:
        return await self._found(request.key, context)

    async def _found(
        self, key: response_cache_pb2.CacheKey, context: grpc.aio.ServicerContext[Any, Any]
    ) -> response_cache_pb2.LookupResponse:
        self.lookups += 1
        await asyncio.sleep(self.delay)
        if self.broken:
            await context.abort(self.status, "scripted")
        found = self.stored.get(key.SerializeToString(deterministic=True))
        timing = timing_pb2.HopTiming(
            total_ns=1000,
            entries=[timing_pb2.TimingEntry(hop=ledger_pb2.HOP_CACHE, kind=ledger_pb2.KIND_CACHE, duration_ns=900)],
        )
        return response_cache_pb2.LookupResponse(
            hit=found is not None, answer=found.answer if found else None, timing=timing
        )

    async def Fill(
        self, request: response_cache_pb2.FillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> response_cache_pb2.FillResponse:
        if self.broken:
            await context.abort(grpc.StatusCode.INTERNAL, "scripted")
        self.stored[request.key.SerializeToString(deterministic=True)] = request
        return response_cache_pb2.FillResponse(stored=True)

    async def Join(
        self,
        request_iterator: AsyncIterator[response_cache_pb2.JoinRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[response_cache_pb2.JoinResponse, None]:
        """Everyone leads."""
        start = (await anext(request_iterator)).start
        found = await self._found(start.key, context)
        role = response_cache_pb2.JOIN_ROLE_HIT if found.hit else response_cache_pb2.JOIN_ROLE_LEADER
        yield response_cache_pb2.JoinResponse(seat=response_cache_pb2.JoinSeat(role=role, lookup=found))
        async for request in request_iterator:
            assert request.WhichOneof("message") == "done", "nobody wanted the chunks"
            fill = response_cache_pb2.FillRequest(key=start.key, answer=request.done.answer)
            if request.done.HasField("ttl"):
                fill.ttl.CopyFrom(request.done.ttl)
            self.stored[start.key.SerializeToString(deterministic=True)] = fill
