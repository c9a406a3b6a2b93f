"""Write the labelled pairs of questions that the semantic cache is calibrated and judged with, one JSON object a line.

    python scripts/write_semantic_pairs.py pairs.jsonl

They are made of scripts/semantic_pairs/intents.txt and opposites.txt; the same files give the same pairs.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from semantic_pairs.pairs import all_pairs, write


def main(output: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write the pairs."""
    pairs = all_pairs()
    write(output, pairs)
    counts = Counter((pair.split, pair.source, pair.same) for pair in pairs)
    for (split, source, same), count in sorted(counts.items()):
        Console().print(f"{count:5d} {split}: {source}, {'the same' if same else 'different'}")


if __name__ == "__main__":
    typer.run(main)
