"""A router of known timing and no model: what the load generator itself is tested against.

python -m baton.bench.reference --ttft-ms 50 --itl-ms 10 --listen 127.0.0.1:50052
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc
from pydantic import Field

from baton.rpc.access import Who
from baton.rpc.errors import Overloaded
from baton.rpc.interceptor import adopt_request_id
from baton.rpc.service import Runtime, main
from baton.rpc.settings import ServiceSettings
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

_MODEL = inference_pb2.Model(name="reference", max_context=8192, vocab_size=1000, ready=True)


class ReferenceSettings(ServiceSettings):
    """`python -m baton.bench.reference`: answers with tokens at known times."""

    serves: ClassVar[Who] = Who.CLIENT

    ttft_ms: float = Field(50.0, ge=0, description="receipt to first token")
    itl_ms: float = Field(10.0, ge=0, description="from token to token")
    fail_every: int = Field(0, ge=0, description="every so many-th request fails with RESOURCE_EXHAUSTED; 0: none")


class Reference(inference_pb2_grpc.InferenceServicer):
    """Sends token k of an answer ttft + k * itl after it received the request: a schedule, lateness never adds up."""

    def __init__(self, settings: ReferenceSettings) -> None:
        self._settings = settings
        self._requests = 0

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """max_tokens tokens on time; half of the prompt counts as cached."""
        loop = asyncio.get_running_loop()
        received = loop.time()
        request_id = adopt_request_id(context)
        self._requests += 1
        if self._settings.fail_every and self._requests % self._settings.fail_every == 0:
            raise Overloaded("told to fail")
        prompt = len(request.token_ids.ids) or len(request.text.split())
        start = inference_pb2.StreamStart(request_id=request_id, model=_MODEL.name, seed=0, prompt_tokens=prompt)
        yield inference_pb2.StreamGenerateResponse(start=start)
        for index in range(request.sampling.max_tokens):
            due = received + (self._settings.ttft_ms + index * self._settings.itl_ms) / 1e3
            await _sleep_until(due)
            chunk = inference_pb2.TokenChunk(index=index, token_ids=[index % _MODEL.vocab_size], text=" word")
            yield inference_pb2.StreamGenerateResponse(chunk=chunk)
        usage = sampling_pb2.Usage(
            prompt_tokens=prompt, cached_prompt_tokens=prompt // 2, completion_tokens=request.sampling.max_tokens
        )
        summary = inference_pb2.Summary(
            finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            usage=usage,
            cache_status=inference_pb2.CACHE_STATUS_BYPASS,
        )
        yield inference_pb2.StreamGenerateResponse(summary=summary)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        """The one model."""
        return inference_pb2.ListModelsResponse(models=[_MODEL])


async def _sleep_until(due: float) -> None:
    """Wake up at `due` on the loop's clock. asyncio's own timers are up to 1 ms late: the last bit is spent awake."""
    loop = asyncio.get_running_loop()
    rough = due - loop.time() - 0.001
    if rough > 0:
        await asyncio.sleep(rough)
    while loop.time() < due:  # noqa: ASYNC110 nothing announces that it is time
        await asyncio.sleep(0)


@asynccontextmanager
async def build(settings: ReferenceSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Register the servicer."""
    inference_pb2_grpc.add_InferenceServicer_to_server(
        Reference(settings),  # type: ignore[abstract]  # the rest is UNIMPLEMENTED, as generated
        runtime.server,
    )
    runtime.register("baton.v1.Inference")
    yield


if __name__ == "__main__":
    sys.exit(main("reference", ReferenceSettings, build))
