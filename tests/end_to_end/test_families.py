"""Greedy fp32 output through the whole mesh equals single-process `transformers`, token by token, for every family."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from baton.v1 import inference_pb2, sampling_pb2
from tests import model_zoo
from tests.fixtures.mesh import running_mesh

NEW_TOKENS = 12
LENGTHS = (7, 23, 40)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def check_equal(model: PreTrainedModel, prompt: list[int], got: list[int]) -> None:
    """Token by token; where they differ first the reference must have hesitated: top-two gap below 1e-4."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = config  # or its end token would end the reference
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert len(got) == len(expected)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            if a != b:
                logits = model(torch.tensor([prompt + expected[:i]])).logits[0, -1].float()
                top = logits.topk(2).values
                gap = float(top[0] - top[1])
                assert gap < 1e-4, f"token {i}: got {a}, expected {b}, gap {gap}"
                return


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
async def test_mesh_equals_generate(family: str, tmp_path: Path) -> None:
    directory = model_zoo.build(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    vocab_size = model.config.get_text_config().vocab_size
    async with (
        running_mesh(
            directory, decode_flags=("--local-prefill-tokens", "0"), worker_flags=("--step-tokens", "16")
        ) as mesh,
        mesh.stub() as stub,
    ):

        async def ask(prompt: list[int]) -> inference_pb2.GenerateResponse:
            return await stub.Generate(
                inference_pb2.GenerateRequest(
                    token_ids=sampling_pb2.TokenIds(ids=prompt),
                    sampling=sampling_pb2.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True),
                ),
                timeout=60,
                wait_for_ready=True,
            )

        asked = prompts(vocab_size)
        answers = await asyncio.gather(*(ask(prompt) for prompt in asked))
        for prompt, answer in zip(asked, answers, strict=True):
            assert answer.summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE
            assert answer.summary.usage.prompt_tokens == len(prompt)
            check_equal(model, prompt, list(answer.token_ids))
        await mesh.wait_quiet()
