"""What the prefix caches are worth: time to the first token of a prompt, of the same again, and of the next turn.

    python -m tests.bench.measure_prefix_cache                  a random ~120M model in bf16, made on the spot
    python -m tests.bench.measure_prefix_cache --model tiny     the bundled one, in fp32; or a directory

A mesh of real processes on loopback: router, a prefill and a decode worker of one thread each, and no response cache.
Every round draws a new prompt, so that it is cold, and asks for it twice; then for it, its answer and 64 tokens more.
Ratios are of pairs within a round. "hit in prefill" is the same where only the prefill worker has a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from baton.models import bundled_model
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import running_mesh
from tests.fixtures.models import write_tokenizer

NEXT_TURN = 64  # tokens


def make_model(directory: Path) -> Path:
    """Llama's shape, 120M parameters, random, bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=0,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory, 32000)
    return directory


async def ask(
    stub: inference_pb2_grpc.InferenceAsyncStub, prompt: list[int], new_tokens: int
) -> tuple[float, list[int], int]:
    """Milliseconds to the first token, the tokens, and how many of the prompt were cached."""
    request = inference_pb2.StreamGenerateRequest(
        token_ids=sampling_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True),
        cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
    )
    started, first, tokens, cached = time.perf_counter(), 0.0, [], 0
    async for message in stub.StreamGenerate(request, timeout=120):
        if message.WhichOneof("event") == "chunk" and message.chunk.token_ids:
            first = first or time.perf_counter() - started
            tokens += message.chunk.token_ids
        elif message.WhichOneof("event") == "summary":
            cached = message.summary.usage.cached_prompt_tokens
    return first * 1e3, tokens, cached


async def rounds(
    model: Path, options: argparse.Namespace, length: int, decode_flags: tuple[str, ...]
) -> list[dict[str, float]]:
    """One dict of milliseconds and hits a round."""
    flags = ("--dtype", options.dtype, "--slot-tokens", str(options.slot_tokens), "--num-slots", "8")
    rng, results = random.Random(1), []
    async with running_mesh(model, worker_flags=flags, decode_flags=decode_flags) as mesh, mesh.stub() as stub:
        for i in range(options.rounds + 1):
            prompt = [rng.randrange(5, options.vocab) for _ in range(length)]
            cold, answer, _ = await ask(stub, prompt, 16)
            again, repeated, hit = await ask(stub, prompt, 16)
            turn = [*prompt, *answer, *(rng.randrange(5, options.vocab) for _ in range(NEXT_TURN))]
            following, _, turn_hit = await ask(stub, turn, 16)
            if i:  # the first warms up
                results.append(
                    {"cold": cold, "again": again, "next turn": following, "hit": hit, "turn hit": turn_hit,
                     "equal": answer == repeated}
                )  # fmt: skip
    return results


def table(name: str, results: list[dict[str, float]]) -> str:
    """A row of Markdown: medians, and medians of the ratios within rounds."""
    middle = {key: statistics.median(r[key] for r in results) for key in ("cold", "again", "next turn")}
    ratios = {key: statistics.median(r[key] / r["cold"] for r in results) for key in ("again", "next turn")}
    worst = max(r["again"] / r["cold"] for r in results)
    equal = sum(bool(r["equal"]) for r in results)
    return (
        f"| {name} | {middle['cold']:.0f} ms | {middle['again']:.1f} ms | {ratios['again']:.2f}x (worst {worst:.2f}) "
        f"| {middle['next turn']:.1f} ms | {ratios['next turn']:.2f}x | {equal} of {len(results)} |"
    )


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help='directory, or "tiny"; default: a random one, made now')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="also write every round here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-prefix-") as directory:
        tiny = options.model == "tiny"
        model = bundled_model() if tiny else Path(options.model) if options.model else make_model(Path(directory))
        config = json.loads((model / "config.json").read_text())
        options.vocab = config["vocab_size"]
        options.dtype = "float32" if tiny else "bfloat16"
        longest = config["max_position_embeddings"]
        length = min(options.prompt_tokens, longest - NEXT_TURN - 64)
        options.slot_tokens = min(longest, length + NEXT_TURN + 64)
        print(f"{length} prompt tokens, {options.dtype}, {options.rounds} rounds")
        print("| prefix cache | cold | same again | ratio | next turn | ratio | same tokens |")
        print("|---|---|---|---|---|---|---|")
        everything = {}
        for name, decode_flags in (("both tiers", ()), ("hit in prefill", ("--no-prefix-cache",))):
            everything[name] = await rounds(model, options, length, decode_flags)
            print(table(name, everything[name]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
