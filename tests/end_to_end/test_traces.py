"""One request is one connected trace through all services; the caller's own trace goes on in it."""

from __future__ import annotations

from pathlib import Path

from baton.v1 import inference_pb2, sampling_pb2
from tests.fixtures.mesh import running_mesh
from tests.fixtures.otlp import Span, receiver

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

EXPECTED = {
    # service, method, kind (2 server, 3 client) -> parent
    ("router", "baton.v1.Inference/Generate", 2): None,
    ("router", "baton.internal.v1.Decode/Generate", 3): ("router", "baton.v1.Inference/Generate", 2),
    ("decode", "baton.internal.v1.Decode/Generate", 2): ("router", "baton.internal.v1.Decode/Generate", 3),
    ("decode", "baton.internal.v1.Prefill/Prefill", 3): ("decode", "baton.internal.v1.Decode/Generate", 2),
    ("prefill", "baton.internal.v1.Prefill/Prefill", 2): ("decode", "baton.internal.v1.Prefill/Prefill", 3),
}


def place(span: Span) -> tuple[str, str, int]:
    return span.service.removeprefix("baton-"), span.name, span.kind


async def test_one_request_is_one_tree(small_model: Path) -> None:
    async with receiver() as collector:
        flags = ("--otlp-endpoint", f"http://{collector.address}")
        async with (
            running_mesh(
                small_model,
                worker_flags=flags,
                router_flags=flags,
                decode_flags=("--local-prefill-tokens", "0"),
            ) as mesh,
            mesh.stub() as stub,
        ):
            await stub.Generate(
                inference_pb2.GenerateRequest(
                    token_ids=sampling_pb2.TokenIds(ids=range(5, 100)),
                    sampling=sampling_pb2.SamplingParams(max_tokens=4, temperature=0),
                ),
                metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),),
                timeout=60,
            )
        spans = {place(span): span for span in collector.traces()[TRACE]}
        assert EXPECTED.keys() <= spans.keys(), spans.keys()
        for where, parent in EXPECTED.items():
            assert spans[where].parent_id == (PARENT if parent is None else spans[parent].span_id)
        told = [span.attributes for span in collector.spans]
        assert not any("prompt" in key for attributes in told for key in attributes)


async def test_no_exporter_no_spans(small_model: Path) -> None:
    """Without an endpoint nothing is exported and nothing is tried."""
    async with running_mesh(small_model) as mesh, mesh.stub() as stub:
        await stub.Generate(
            inference_pb2.GenerateRequest(
                token_ids=sampling_pb2.TokenIds(ids=[7]), sampling=sampling_pb2.SamplingParams(max_tokens=1)
            ),
            timeout=60,
        )
        assert all("otlp" not in service.log.read_text().lower() for service in mesh.services.values())
