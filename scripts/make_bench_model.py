"""Make the random model that the figures of docs/performance.md are measured on.

python scripts/make_bench_model.py DIR [--size 120m | 500m] [--layers N ...]
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from baton.bench.random_model import SHAPES, write_model


def main(
    directory: Annotated[Path, typer.Argument(help="Directory to write; it is made.", metavar="DIR")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "120m",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    hidden: Annotated[int | None, typer.Option(min=8, help="Hidden size.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=8, help="Dimensions of a head.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=8, help="Width of the feed-forward part.")] = None,
    vocab: Annotated[int | None, typer.Option(min=261, help="Tokens of the vocabulary.")] = None,
    context: Annotated[int | None, typer.Option(min=32, help="Longest prompt and answer together, tokens.")] = None,
) -> None:
    """Write a Llama-shaped model with random bfloat16 weights."""
    if size not in SHAPES:
        raise typer.BadParameter(f"{size!r} is none of {', '.join(SHAPES)}", param_hint="--size")
    wanted = {
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": intermediate,
        "vocab": vocab,
        "context": context,
    }
    shape = replace(SHAPES[size], **{name: value for name, value in wanted.items() if value is not None})
    if shape.heads % shape.kv_heads:
        raise typer.BadParameter("query heads are a multiple of key and value heads", param_hint="--kv-heads")
    write_model(directory, shape, seed)
    typer.echo(f"{directory}: {shape.parameters / 1e6:.0f} million parameters")


if __name__ == "__main__":
    typer.run(main)
