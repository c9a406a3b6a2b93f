"""`baton bench handoff`: how fast KV moves between two processes here, beside what the machine can do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from baton.bench.handoff import run
from baton.bench.handoff_shape import Shape
from baton.cli import console

_DEFAULT = Shape()


def handoff(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = _DEFAULT.tokens,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens that become ready at a time.")] = _DEFAULT.step_tokens,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = _DEFAULT.layers,
    heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = _DEFAULT.heads,
    dim: Annotated[int, typer.Option(min=1, help="Elements of a head's key; bfloat16.")] = _DEFAULT.dim,
    rounds: Annotated[int, typer.Option(min=1, help="Times everything is measured.")] = 15,
    credit_mib: Annotated[int, typer.Option(min=1, help="MiB in flight over gRPC.")] = 8,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here; - prints them instead of the table.")
    ] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Measure the transports of KV, without a model, beside memcpy, loopback TCP and a bare gRPC stream.

    Two processes of this machine and nothing else: what other machines do to each other it does not know.
    """
    shape = Shape(tokens, min(step_tokens, tokens), layers, heads, dim)
    result = asyncio.run(run(shape, rounds, credit_mib << 20))
    text = json.dumps(result.to_json(), indent=2) + "\n"
    if json_file == Path("-"):
        print(text, end="")
    else:
        if json_file is not None:
            json_file.write_text(text, encoding="utf-8")
        console.out.print(f"{result.bytes / 1e6:.1f} MB of KV, {rounds} rounds")
        console.out.print(Markdown(result.markdown()))
    if markdown_file is not None:
        markdown_file.write_text(result.markdown(), encoding="utf-8")
