"""`baton bench limits`: what this machine can do at best."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.bench.limits import ProbeFailed, measure
from baton.cli.bench.running import JsonFile, MarkdownFile, Model, Rounds, measuring, model_directory, tell


def limits(
    model: Model = None,
    rounds: Rounds = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of one measurement.")] = 0.5,
    tokens: Annotated[int, typer.Option(min=17, help="Rows of the matrix products.")] = 2048,
    json_file: JsonFile = None,
    markdown_file: MarkdownFile = None,
) -> None:
    """Measure the physical limits of this machine.

    Copying and reading memory, matrix products of the model's shapes in bfloat16, float32 and int8: on one core and on
    all at once; bytes over loopback TCP and over a bare gRPC stream.
    """
    directory = model_directory(model)
    with measuring(ProbeFailed) as (on_progress, use):
        figures = measure(directory, rounds, seconds, tokens, on_progress)
    facts = {"model": directory.name, "message over TCP and gRPC": "512 KiB"}
    tell("Limits of the machine", figures, use, facts, json_file, markdown_file)
