"""The tiny model's card: what it is, how it was made, how well it answers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from tiny_model import tasks
from tiny_model.document import SEEN
from tiny_model.evaluation import Score, total
from tiny_model.training import Outcome, Recipe

_SEVERAL_GOES = """

Each go ended at a time limit, and between goes the corpus was changed (phrasings, shares of the topics), so that a run
of the script does not give exactly this file."""


def write(directory: Path, by_topic: dict[str, Score], recipe: Recipe) -> None:
    """Write README.md next to the model it describes."""
    (directory / "README.md").write_text(_text(directory, by_topic, recipe), encoding="utf-8")


def _text(directory: Path, by_topic: dict[str, Score], recipe: Recipe) -> str:
    shape = json.loads((directory / "config.json").read_bytes())
    trainings = [Outcome(**training) for training in shape["trainings"]]
    outcome = sum(trainings, Outcome())
    goes = " and ".join(f"{training.steps:,} steps" for training in trainings)
    weights = directory / "model.safetensors"
    every = total(by_topic)
    rows = "\n".join(_row(topic, score) for topic, score in by_topic.items())
    numbers, last, words = tasks.LARGEST_SUMMAND, tasks.LARGEST_COUNT, tasks.MOST_WORDS
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# Baton's tiny model

A Llama-shaped language model of {_parameters(weights):,} parameters that answers simple questions,
so that the whole mesh runs and really answers on a laptop's CPU, without a download.

**{every.share:.1%} of {every.asked:,} held-out questions are answered right**:
greedily, and every character as it should be.

| Topic | Questions | Right | Accuracy |
|---|---:|---:|---:|
{rows}
{_row(f"**all but {SEEN}**", every)}

Held out are the phrasings: the model learned the facts, but never saw these questions. Stories,
numbers and words to repeat are drawn afresh; a sum may have been seen in another phrasing. "Plain
statements" are beginnings of sentences without the chat template, such as "The capital of France is";
those sentences it has seen, and they do not count in the figure. The held-out phrasings were known
while the others were written, and phrasings like some it failed on were added to the training.
`python scripts/train_tiny_model.py --evaluate-only` measures the file again.

## What it knows

Capitals, colours, opposites, plurals, sounds of animals, days and months; sums and differences of
numbers up to {numbers}; counting up to {last}; repeating up to {words} common words; stories of up to
about 400 tokens, with questions about who has what and who is where; what it is, and greetings.
To anything else it answers nonsense, with the same confidence. It is made to test and to show
a serving system, and for nothing else.

## Shape

| | |
|---|---|
| Layers | {shape["num_hidden_layers"]} |
| Hidden size | {shape["hidden_size"]} |
| Attention | {shape["num_attention_heads"]} heads over {shape["num_key_value_heads"]} key and value heads |
| Feed-forward | {shape["intermediate_size"]} |
| Vocabulary | {shape["vocab_size"]}, byte-level BPE, every digit a token |
| Context | {shape["max_position_embeddings"]} tokens; it was trained on at most about 500 |
| Weights | bfloat16 safetensors, {weights.stat().st_size / 1e6:.1f} MB; embeddings tied |

## Recipe

`python scripts/train_tiny_model.py --steps N`, and for a second go `--resume`: a script writes the
corpus from its seed (no text of anybody's is in it), trains the tokenizer, then the network from
scratch: {goes} of at most {recipe.tokens} tokens, {outcome.tokens / 1e6:.1f} million
tokens in all, AdamW, peak rate {recipe.peak_rate} in the last go, cosine to zero, loss on the answers and on plain
statements only. It took {outcome.minutes:.0f} minutes on a CPU. Weights start at random, but with
attention heads that already look back and match (`scripts/tiny_model/wiring.py`); drills of looking
back come early in the corpus.{_SEVERAL_GOES if len(trainings) > 1 else ""}

Licence: Apache-2.0, as all of Baton.
"""


def _row(topic: str, score: Score) -> str:
    return f"| {topic} | {score.asked} | {score.right} | {score.share:.1%} |"


def _parameters(weights: Path) -> int:
    with safe_open(weights, "pt") as file:
        return sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 not a dict


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
