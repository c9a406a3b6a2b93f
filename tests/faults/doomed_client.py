"""A client to be killed: `python -m tests.faults.doomed_client ROUTER` asks what one line of JSON on stdin says."""

from __future__ import annotations

import asyncio
import json
import sys

import grpc

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2


async def main(router: str, asked: list[dict]) -> None:
    """Read all streams until killed."""
    async with grpc.aio.insecure_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def read(number: int, question: dict) -> None:
            request = inference_pb2.StreamGenerateRequest(
                token_ids=sampling_pb2.TokenIds(ids=question["prompt"]),
                sampling=sampling_pb2.SamplingParams(**question["sampling"]),
                cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
            )
            metadata = (("x-request-id", f"doomed-{number}"),)
            async for _ in stub.StreamGenerate(request, timeout=120, metadata=metadata):
                pass

        await asyncio.gather(*(read(number, question) for number, question in enumerate(asked)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.stdin.readline())))
