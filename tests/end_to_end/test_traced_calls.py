"""Which calls are traced: those of requests, not an operator's; and of these the share that was asked for."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.internal.v1 import observe_pb2, observe_pb2_grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import Service
from tests.fixtures.traced import traced_mesh

REQUEST = inference_pb2.GenerateRequest(
    token_ids=sampling_pb2.TokenIds(ids=range(5, 100)), sampling=sampling_pb2.SamplingParams(max_tokens=2)
)
TRACES = [f"{number:032x}" for number in range(1, 5)]
PARENT = "b7ad6b7169203331"


async def operate(service: Service) -> None:
    """What operators and their tools ask a service."""
    async with grpc.aio.insecure_channel(service.admin) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        assert [answer async for answer in reflection.ServerReflectionInfo(iter(asked), timeout=10)]
        if service.name == "router":
            observe = observe_pb2_grpc.ObserveStub(channel)
            await observe.ListRecords(observe_pb2.ListRecordsRequest(limit=1), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError):
                await observe.GetRecord(observe_pb2.GetRecordRequest(request_id="none"), timeout=10)
            async for _ in observe.WatchMesh(observe_pb2.WatchMeshRequest(), timeout=10):
                break
        else:
            await service.debug_state()


async def test_operators_calls_are_no_traces(small_model: Path) -> None:
    async with traced_mesh(small_model) as (mesh, collector):
        for service in mesh.services.values():
            await operate(service)
        async with mesh.stub() as stub:
            await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    # A client's call is one: the services do export.
    assert [span.name for span in collector.spans] == ["baton.v1.Inference/ListModels"]


@pytest.mark.parametrize("ratio", ["0", "1"])
async def test_the_ratio_is_for_those_whose_caller_did_not_decide(small_model: Path, ratio: str) -> None:
    async def ask(stub: inference_pb2_grpc.InferenceAsyncStub, *parents: str) -> None:
        await stub.Generate(REQUEST, metadata=tuple(("traceparent", parent) for parent in parents), timeout=60)

    flags = ("--trace-ratio", ratio)
    remote = ("--local-prefill-tokens", "0")
    async with traced_mesh(small_model, *flags, decode_flags=remote) as (mesh, collector), mesh.stub() as stub:
        await ask(stub)
        await ask(stub, f"00-{TRACES[0]}-{PARENT}-01")
        await ask(stub, f"00-{TRACES[1]}-{PARENT}-00")
    traces = collector.traces()
    everywhere = {"baton-router", "baton-decode", "baton-prefill"}
    assert {span.service for span in traces.pop(TRACES[0])} == everywhere, "a sampled parent wins"
    assert TRACES[1] not in traces, "so does one that is not"
    assert len(traces) == int(ratio)
    assert all({span.service for span in spans} == everywhere for spans in traces.values())


async def test_who_shares_a_generation_says_with_whom(small_model: Path) -> None:
    """Also when the one it was generated for is gone: what is done for the others is still told in its trace."""
    request = inference_pb2.StreamGenerateRequest(
        token_ids=REQUEST.token_ids,
        sampling=sampling_pb2.SamplingParams(max_tokens=300, temperature=0, ignore_eos=True),
    )
    async with traced_mesh(small_model, cache=True) as (mesh, collector), mesh.stub() as stub:
        metadata = [(("traceparent", f"00-{trace}-{PARENT}-01"), ("x-request-id", trace)) for trace in TRACES[:2]]
        first = stub.StreamGenerate(request, metadata=metadata[0], timeout=60)
        for _ in range(2):
            await first.read()
        second = stub.StreamGenerate(request, metadata=metadata[1], timeout=60)
        await second.read()
        first.cancel()
        while (message := await second.read()) is not grpc.aio.EOF:
            last = message
        assert last.summary.cache_status == inference_pb2.CACHE_STATUS_COALESCED
    traces = collector.traces()
    (shared,) = traces[TRACES[1]]
    assert (shared.attributes["baton.cache"], shared.attributes["baton.coalesced_with"]) == ("coalesced", TRACES[0])
    origin = traces[TRACES[0]]
    ids = {span.span_id for span in origin} | {PARENT}
    assert {span.service for span in origin} >= {"baton-router", "baton-cache", "baton-decode"}
    assert all(span.parent_id in ids for span in origin), "nothing hangs in the air"
    (root,) = (span for span in origin if span.name == "baton.v1.Inference/StreamGenerate")
    assert root.attributes["baton.outcome"] == "cancelled"
    (decode,) = (span for span in origin if span.name == "decode")
    assert decode.end_ns > root.end_ns, "it went on for the other"
