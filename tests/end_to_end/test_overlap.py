"""KV leaves while the prompt is still being computed: what comes after the first token is the last chunk's at most."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from baton.handoff.transport import Transport, name, needs_choice
from baton.internal.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, prefill_pb2_grpc
from baton.v1 import inference_pb2, ledger_pb2
from tests.end_to_end.test_pure_tokens import fingerprint
from tests.fixtures.mesh import Service, running_mesh
from tests.fixtures.models import full_sampling, random_llama

pytestmark = pytest.mark.timeout(300)  # several services, each of which measures the machine when it starts

STEP = 64
CHUNKS = 12
LAYERS = 6
HIDDEN = 256
REQUESTS = 8
TABLE = kv_pb2.LayerTable(
    dtype=kv_pb2.KV_DTYPE_FLOAT32,
    layers=[
        kv_pb2.Layer(key=str(i), kind=kv_pb2.LAYER_KIND_KV, heads=2, key_dim=HIDDEN // 4, value_dim=HIDDEN // 4)
        for i in range(LAYERS)
    ],
)


def prompt(i: int) -> list[int]:
    return [5 + (j * j + i) % 370 for j in range(STEP * CHUNKS)]


@dataclass
class Order:
    """Layer-tokens that came before and after the first token."""

    before: int = 0
    after: int = 0


async def order(prefill: Service, transport: Transport, i: int) -> Order:
    """What decode does, by hand."""
    came, layer_tokens, first = Order(), STEP * CHUNKS * LAYERS, False
    start = prefill_pb2.Start(
        request_id=f"by-hand-{i}", wire_version=2, model_fingerprint=await fingerprint(prefill), layer_table=TABLE,
        token_ids=prompt(i), prompt_tokens=STEP * CHUNKS, sampling=full_sampling(max_tokens=4),
        credit_bytes=1 << 30, codecs=[kv_pb2.KV_CODEC_RAW], transports=[transport],
    )  # fmt: skip
    async with grpc.aio.insecure_channel(prefill.address) as channel:
        call = prefill_pb2_grpc.PrefillStub(channel).Prefill(timeout=60)
        await call.write(prefill_pb2.PrefillRequest(start=start))
        if needs_choice([transport]):
            await call.write(prefill_pb2.PrefillRequest(choice=prefill_pb2.Choice(transport=transport)))
        async for message in call:
            kind = message.WhichOneof("message")
            if kind in ("chunk", "ranges"):
                tokens = message.chunk.tokens + sum(item.tokens for item in message.ranges.ranges)
                came.after += tokens * first
                came.before += tokens * (not first)
                if came.before + came.after == layer_tokens:
                    await call.done_writing()
            first = first or kind == "first_token"
    assert came.before + came.after == layer_tokens
    return came


@pytest.mark.parametrize("transport", [inference_pb2.TRANSPORT_SHM, inference_pb2.TRANSPORT_GRPC], ids=name)
async def test_only_the_last_chunk_is_exposed(transport: Transport, tmp_path: Path) -> None:
    """A prompt of twelve chunks. The token overtakes KV that has not left, so what had not left comes behind it.

    On a busy machine a process may lose its turn just then: the best of several requests counts. KV that left only
    after the prompt would come behind the token in every one.
    """
    model = random_llama(tmp_path / "model", hidden=HIDDEN, layers=LAYERS, context=1024)
    flags = ("--shm-dir", str(tmp_path / "shm"), "--step-tokens", str(STEP), "--no-prefix-cache")
    async with running_mesh(model, worker_flags=flags, decode_flags=("--transport", name(transport))) as mesh:
        prefill, decode = mesh.tier("prefill")[0], mesh.tier("decode")[0]
        orders = [await order(prefill, transport, i) for i in range(REQUESTS)]
        assert min(came.after for came in orders) <= STEP * LAYERS, orders

        # The mesh's own account agrees: KV moved while the prompt was computed, and the wait is the shorter part.
        async with grpc.aio.insecure_channel(decode.address) as channel:
            shares = []
            for i in range(REQUESTS):
                asked = decode_pb2.GenerateRequest(
                    request_id=f"mesh-{i}", model_fingerprint=await fingerprint(decode), token_ids=prompt(i),
                    sampling=full_sampling(max_tokens=2),
                    prefill_candidates=[decode_pb2.PrefillCandidate(target=prefill.address)],
                )  # fmt: skip
                async for message in decode_pb2_grpc.DecodeStub(channel).Generate(asked, timeout=60):
                    finished = message.finished
                assert finished.transport == transport
                spent = {(entry.hop, entry.kind): entry.duration_ns for entry in finished.timing.entries}
                exposed = spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_TRANSFER]
                computed = spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_COMPUTE]
                assert finished.timing.hidden_transfer_ns > 0
                shares.append(exposed / computed)
                print(name(transport), computed / 1e6, finished.timing.hidden_transfer_ns / 1e6, exposed / 1e6)
        assert min(shares) <= 1 / CHUNKS, shares
