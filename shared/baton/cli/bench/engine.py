"""`baton bench engine`: the engine alone, beside its limits."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cli import console
from baton.cli.bench.running import (
    Dtype,
    JsonFile,
    MarkdownFile,
    Model,
    Rounds,
    all_cores,
    measuring,
    model_directory,
    tell,
)
from baton.engine.config import EngineConfig, Quantization
from baton.engine.errors import EngineError
from baton.engine.layout import KvDtype


def engine(
    model: Model = None,
    dtype: Dtype = KvDtype.BFLOAT16,
    quantization: Annotated[Quantization, typer.Option(help="How weights are stored.")] = Quantization.NONE,
    rounds: Rounds = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens decoding requests have behind them.")] = 256,
    longest: Annotated[int, typer.Option(min=2, help="Longest prompt and context measured.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of one measurement.")] = 16,
    step_tokens: Annotated[int | None, typer.Option(min=1, help="Token budget of one engine step.")] = None,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure the engine in process: decode at batch 1 to 16, prefill of 128 to 2,048 tokens, overhead of a step.

    Beside decode and prefill stands the speed of the same model's linear layers alone, measured at once with it, each
    weight cold. Overhead is what a step takes besides the model's own code. Exit code 4 when less is reached than
    wanted.
    """
    from baton.bench.engine import Questions, measure
    from baton.bench.linears import LinearLayers
    from baton.bench.shapes import NoLinears, read_linears
    from baton.bench.stepping import StepFailed, Stepped
    from baton.engine.pool import TORCH_DTYPES

    directory = model_directory(model)
    prompts = [tokens for tokens in (128, 256, 512, 1024, 2048, 4096, 8192) if tokens < longest]
    config = EngineConfig(
        model=directory,
        dtype=dtype,
        quantization=quantization,
        num_slots=16,
        slot_tokens=max(longest, context) + steps + 8,
        threads=threads or all_cores(),
        step_tokens=step_tokens or EngineConfig(directory).step_tokens,
    )
    questions = Questions(
        context=context, long_context=longest, prompts=(*prompts, longest), steps=steps, rounds=rounds
    )
    with measuring(EngineError, NoLinears, StepFailed) as (on_progress, use):
        on_progress("loading")
        stepped = Stepped(config)
        if stepped.engine.longest < longest + steps + 3:
            console.fail(
                f"the model's context is {stepped.engine.longest} tokens: --longest {longest} is too much", code=2
            )
        linears = LinearLayers(read_linears(directory), TORCH_DTYPES[dtype])
        figures = measure(stepped, linears, questions, on_progress)
    facts = {
        "model": directory.name,
        "dtype": dtype,
        "quantization": quantization.value,
        "threads": str(config.threads),
        "tokens a step": str(config.step_tokens),
    }
    tell("The engine alone", figures, use, facts, json_file, markdown_file)
