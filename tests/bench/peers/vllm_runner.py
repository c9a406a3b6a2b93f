"""vLLM on CPU through its own AsyncLLM, undivided or divided by its own connectors. Runs in vLLM's environment:

    VENV/bin/python -m tests.bench.peers.vllm_runner --model DIR [--divided file|nixl] [--cases one,eight] [--rounds 3]

Divided, a prefill engine runs on core 0 and a decode engine on core 1, and a request goes the way vLLM's own proxies
send it: to prefill for one token, which is dropped, then to decode for the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from baton.bench.streams import Source
from tests.bench.peers.cases import measure, parser, tell

_FILES = Path("/dev/shm")
"""Where the file connector's files lie: in memory, the best it can get."""


class VllmSource:
    """An AsyncLLM as a source of streams."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        """See `Source`."""
        async with contextlib.aclosing(self.outputs(prompt, output_tokens, {})) as outputs:
            async for output in outputs:
                if count := len(output.outputs[0].token_ids):
                    yield count

    async def outputs(
        self, prompt: tuple[int, ...], output_tokens: int, transfer: Mapping[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """vLLM's own outputs, new tokens only."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": dict(transfer)} if transfer else None,
        )
        name = str(next(self._numbers))
        outputs = self._engine.generate({"prompt_token_ids": list(prompt)}, sampling, request_id=name)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output


class DividedSource:
    """Two of them: one computes prompts, the other answers."""

    def __init__(self, prefill: VllmSource, decode: VllmSource, connector: str) -> None:
        self._prefill = prefill
        self._decode = decode
        self._asked = {"do_remote_decode": True, "do_remote_prefill": False} if connector == "nixl" else {}

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        """See `Source`."""
        transfer: Mapping[str, Any] = {}
        async for output in self._prefill.outputs(prompt, 1, self._asked):
            transfer = output.kv_transfer_params or transfer
        async with contextlib.aclosing(self._decode.outputs(prompt, output_tokens, transfer)) as outputs:
            async for output in outputs:
                if count := len(output.outputs[0].token_ids):
                    yield count


@contextlib.asynccontextmanager
async def engine(arguments: argparse.Namespace, cpus: str, transfer: Mapping[str, Any]) -> AsyncIterator[VllmSource]:
    """One engine on these cores."""
    # Both are read by the engine's process when it starts.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cpus
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(5600 + int(cpus.partition("-")[0]))
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {"kv_transfer_config": KVTransferConfig(**transfer)} if transfer else {}
    if arguments.step_tokens:
        options["max_num_batched_tokens"] = arguments.step_tokens
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=arguments.model,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=32,
            enable_prefix_caching=False,
            enforce_eager=arguments.eager,
            **options,
        )
    )
    try:
        yield VllmSource(llm)
    finally:
        llm.shutdown()


@contextlib.asynccontextmanager
async def divided(arguments: argparse.Namespace) -> AsyncIterator[Source]:
    """Prefill on core 0, decode on core 1."""
    files = tempfile.mkdtemp(dir=_FILES)
    if arguments.divided == "file":
        common: dict[str, Any] = {
            "kv_connector": "ExampleConnector",
            "kv_connector_extra_config": {"shared_storage_path": files},
        }
        roles = ("kv_producer", "kv_consumer")
    else:
        common = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}
        roles = ("kv_both", "kv_both")
    try:
        async with (
            engine(arguments, "0", {**common, "kv_role": roles[0]}) as prefill,
            engine(arguments, "1", {**common, "kv_role": roles[1]}) as decode,
        ):
            yield DividedSource(prefill, decode, arguments.divided)
    finally:
        shutil.rmtree(files)


async def run(arguments: argparse.Namespace) -> None:
    """Load, measure, tell."""
    source = divided(arguments) if arguments.divided else engine(arguments, arguments.cpus, {})
    async with source as running:
        async for result in measure(running, arguments):
            tell(result)


def main() -> None:
    """Parse the command line; vLLM reads its environment when it is imported."""
    options = parser()
    options.add_argument("--cpus", default="0-1", help="cores of vLLM's OpenMP threads, undivided")
    options.add_argument("--divided", choices=("file", "nixl"), help="two engines, and what carries KV between them")
    options.add_argument("--eager", action="store_true", help="do not compile")
    options.add_argument("--step-tokens", type=int, default=0, help="token budget of a step; 0: vLLM's default")
    arguments = options.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
