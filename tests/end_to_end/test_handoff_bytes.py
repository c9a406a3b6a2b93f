"""KV that arrives over gRPC is bit for bit what a single-process engine computes, and goes on to the same tokens."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import torch

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.layout import KvDtype
from baton.engine.messages import Commit, Event, Output, Reserved, Role, SamplingParams, Submit
from baton.handoff.receiver import KvReceiver
from baton.handoff.wire import WIRE_VERSION, Chunk, first_moved, layer_table
from baton.internal.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc
from baton.v1 import inference_pb2
from tests import model_zoo
from tests.fixtures.mesh import running_mesh
from tests.fixtures.models import full_sampling

NEW_TOKENS = 12
CREDIT = 1 << 30


class Local:
    """An engine in this process, stepped by hand."""

    def __init__(self, model: Path, dtype: KvDtype) -> None:
        self.events: list[Event] = []
        config = EngineConfig(model=model, dtype=dtype, num_slots=2, step_tokens=32, prefix_cache=False)
        self.engine = Engine.load(config, self.events.extend)
        self.sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

    def submit(self, role: Role, prompt: list[int]) -> None:
        self.engine.handle(
            Submit(
                request_id=role.value,
                role=role,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=self.sampling,
            )
        )
        self.run()

    def run(self) -> None:
        while self.engine.has_work:
            self.engine.step()

    def tokens(self, role: Role) -> list[int]:
        outputs = [e for e in self.events if isinstance(e, Output) and e.request_id == role.value]
        return [token for output in outputs for token in output.token_ids]

    def kv(self, slot: int, tokens: int) -> list[bytes]:
        """Of what the token after the prompt sees: nothing else moves."""
        layout, memory = self.engine.layout, memoryview(self.engine.pool.memory)
        return [
            bytes(part)
            for i in range(len(layout.layers))
            for part in layout.rows(memory, i, slot, first_moved(layout, i, 0, tokens), tokens)
        ]


async def receive(address: str, local: Local, slot: int, prompt: list[int]) -> int:
    """What decode does, by hand: fetch the KV of `prompt` into a slot. Returns the first token."""
    spec = local.engine.spec
    receiver = KvReceiver(local.engine.layout, memoryview(local.engine.pool.memory), slot, 0, len(prompt), CREDIT)
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        call = prefill_pb2_grpc.PrefillStub(channel).Prefill(timeout=30)
        await call.write(
            prefill_pb2.PrefillRequest(
                start=prefill_pb2.Start(
                    request_id="by-hand",
                    wire_version=WIRE_VERSION,
                    model_fingerprint=spec.fingerprint,
                    layer_table=layer_table(spec),
                    token_ids=prompt,
                    prompt_tokens=len(prompt),
                    sampling=full_sampling(max_tokens=NEW_TOKENS),
                    credit_bytes=CREDIT,
                    codecs=[kv_pb2.KV_CODEC_RAW],
                    transports=[inference_pb2.TRANSPORT_GRPC],
                )
            )
        )
        await call.done_writing()
        first = -1
        async for message in call:
            match message.WhichOneof("message"):
                case "chunk":
                    receiver.accept(Chunk(message.chunk, (message.chunk.data,)))
                case "first_token":
                    first = message.first_token.token_id
                case "done":
                    receiver.verify(message.done)
                    return first
    raise AssertionError("no end")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", KvDtype.FLOAT32),
        ("llama", KvDtype.BFLOAT16),
        ("gemma2", KvDtype.FLOAT32),
        ("gpt_oss", KvDtype.FLOAT32),
        ("llama4_text", KvDtype.FLOAT32),
        ("deepseek_v3", KvDtype.FLOAT32),
    ],
)
async def test_bit_equal(family: str, dtype: KvDtype, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # as the engine's process: more threads split sums differently
    model = model_zoo.build(family, tmp_path / family)
    prompt = [5 + (j * j) % 370 for j in range(100)]
    # Where a prompt's beginning is known, its end is computed in other chunks, and rounded otherwise.
    flags = ("--step-tokens", "32", "--dtype", dtype.value, "--no-prefix-cache")
    async with running_mesh(model, worker_flags=flags) as mesh:
        single = Local(model, dtype)
        single.submit(Role.PREFILL, prompt)
        expected_kv = single.kv(0, len(prompt))
        single.submit(Role.GENERATE, prompt)
        other = Local(model, dtype)
        other.submit(Role.RECEIVE, prompt)
        reserved = next(e for e in other.events if isinstance(e, Reserved))
        first = await receive(mesh.tier("prefill")[0].address, other, reserved.slot, prompt)
        assert [first] == single.tokens(Role.PREFILL)
        assert other.kv(reserved.slot, len(prompt)) == expected_kv
        other.engine.handle(Commit(Role.RECEIVE.value, [first]))
        other.run()
        assert [first, *other.tokens(Role.RECEIVE)] == single.tokens(Role.GENERATE)
