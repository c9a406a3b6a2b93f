"""A request that breaks what computes it, in a mesh of real processes: tried twice, refused, and alone in that."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from baton.rpc.errors import reason_of
from baton.v1 import inference_pb2
from tests.end_to_end.test_faults import ask, collect, trials
from tests.fixtures.mesh import running_mesh
from tests.fixtures.models import random_llama

POISON = 66
"""A token whose embedding is NaN. Neither the other prompts nor the engine at its start ask for it."""


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_llama(tmp_path_factory.mktemp("poisoned-llama"))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def harmless(i: int) -> inference_pb2.StreamGenerateRequest:
    request = ask(30 + i, 120, i)
    request.token_ids.ids[:] = [70 + token_id % 300 for token_id in request.token_ids.ids]
    request.sampling.logit_bias[POISON] = -100
    return request


@pytest.mark.parametrize("flags", [("--local-prefill-tokens", "1000"), ("--local-prefill-tokens", "0")])
async def test_a_poison_is_refused_and_its_mates_are_not(poisoned_model: Path, flags: tuple[str, ...]) -> None:
    """Wherever its prompt is computed first."""
    async with running_mesh(poisoned_model, decode=2, decode_flags=flags) as mesh, mesh.stub() as stub:
        asked = [harmless(i) for i in range(6)]
        expected = [(await collect(stub, one))[0] for one in asked]
        running = [asyncio.create_task(collect(stub, one)) for one in asked]
        bad = harmless(7)
        bad.token_ids.ids.append(POISON)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, bad)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason_of(caught.value) == "POISON_REQUEST"
        assert [tokens for tokens, _ in await asyncio.gather(*running)] == expected
        tried = [await trials(worker) for worker in mesh.tier("decode")]
        assert sum(outcomes["guilty"] for outcomes in tried) == 1
        await mesh.wait_quiet()
