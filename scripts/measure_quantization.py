"""What int8 weights cost in quality: perplexity of a model on text it was not trained on, beside its own without them.

    python scripts/measure_quantization.py                          # the bundled model, on new text of its corpus
    python scripts/measure_quantization.py --model DIR --text FILE

Every linear layer is int8 in every step here, whatever the calibration of this machine says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from tiny_model import corpus
from tiny_model.tokenizer import encode
from tokenizers import Tokenizer

from baton.engine.attention import Call, attend, attending
from baton.engine.calibrate import Calibration
from baton.engine.config import EngineConfig, Quantization
from baton.engine.layout import KvDtype
from baton.engine.loader import forward, load
from baton.models import bundled_model

NEW_TEXT_SEED = 987_654
WINDOW = 256


def main(
    model: Annotated[Path | None, typer.Option(help="Model directory; default: the bundled one.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text; default: new documents of the bundled model's corpus.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text, at most.")] = 16_384,
) -> None:
    """Print perplexities and their ratio."""
    directory = model or bundled_model()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text()).ids if text else _corpus(tokenizer, tokens)
    windows = [ids[i : i + WINDOW + 1] for i in range(0, min(len(ids), tokens) - WINDOW, WINDOW)]
    if not windows:
        raise typer.BadParameter(f"{len(ids)} tokens of text; at least {WINDOW + 1} are needed")
    table = Table("element type", "perplexity", "with int8", "ratio", title=f"{len(windows) * WINDOW:,} tokens")
    for dtype in KvDtype:
        plain, int8 = (_perplexity(directory, dtype, kind, windows) for kind in Quantization)
        table.add_row(dtype.value, f"{plain:.3f}", f"{int8:.3f}", f"{int8 / plain:.4f}")
    Console().print(table)


def _corpus(tokenizer: Tokenizer, tokens: int) -> list[int]:
    ids: list[int] = []
    for document in corpus.documents(NEW_TEXT_SEED, 0):
        ids += encode(tokenizer, document)[0]
        if len(ids) > tokens:
            break
    return ids


@torch.inference_mode()
def _perplexity(directory: Path, dtype: KvDtype, quantization: Quantization, windows: list[list[int]]) -> float:
    with patch.object(Calibration, "rows", lambda *_: WINDOW):
        module = load(EngineConfig(model=directory, dtype=dtype, quantization=quantization)).module
    total = 0.0
    with attending(_causal):
        for ids in windows:
            logits = forward(module, torch.tensor([ids[:-1]]), torch.arange(WINDOW).view(1, -1), None)
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    return math.exp(total / (len(windows) * WINDOW))


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
    return attend(query, key, value, call, None, causal=True).transpose(1, 2)


if __name__ == "__main__":
    typer.run(main)
