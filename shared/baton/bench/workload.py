"""What is asked: prompts and answer lengths, drawn from distributions with a seed."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FIRST_ORDINARY_ID: Final = 16
"""Lower token ids are special ones in most vocabularies."""


class BadLengths(ValueError):
    """Not a distribution of lengths."""


def vocabulary(model: Path) -> int:
    """Tokens of a model directory's vocabulary.

    Raises:
        ValueError: its configuration does not say.
    """
    return _configured(model, "vocab_size")


def longest_context(model: Path) -> int:
    """Tokens of prompt and answer together that a model directory was made for.

    Raises:
        ValueError: its configuration does not say.
    """
    return _configured(model, "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: fixed ("128"), uniform ("64-256"), or log-normal ("128~0.5": median, sigma)."""

    text: str
    low: int
    high: int
    sigma: float = 0.0

    @staticmethod
    def parse(text: str) -> Lengths:
        """The distribution a text names.

        Raises:
            BadLengths: it names none.
        """
        if match := re.fullmatch(r"(\d+)", text):
            low = high = int(match[1])
            sigma = 0.0
        elif match := re.fullmatch(r"(\d+)-(\d+)", text):
            low, high, sigma = int(match[1]), int(match[2]), 0.0
        elif match := re.fullmatch(r"(\d+)~(\d*\.?\d+)", text):
            low = high = int(match[1])
            sigma = float(match[2])
        else:
            raise BadLengths(f"{text!r} is no length: write 128, 64-256, or 128~0.5 (median and sigma)")
        if not 1 <= low <= high:
            raise BadLengths(f"{text!r}: lengths are 1 or more, the smaller first")
        return Lengths(text, low, high, sigma)

    def draw(self, rng: random.Random) -> int:
        """One length, 1 or more."""
        if self.sigma:
            return max(1, round(self.low * math.exp(rng.gauss(0.0, self.sigma))))
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to make."""

    prompt: str | tuple[int, ...]
    output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Where jobs come from. The same workload and seed give the same jobs."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    vocab_size: int
    max_context: int
    """Tokens of prompt plus answer at most: longer draws are cut. 0: unknown."""
    shared_prefix: int = 0
    """First tokens all prompts share."""
    prompts: Sequence[str] = ()
    """Texts to ask in turn, instead of random tokens."""

    def jobs(self, seed: int) -> Iterator[Job]:
        """Endlessly many jobs."""
        rng = random.Random(seed)
        prefix = self._random_ids(rng, self.shared_prefix)
        number = 0
        while True:
            output = self.output_tokens.draw(rng)
            if self.prompts:
                prompt: str | tuple[int, ...] = self.prompts[number % len(self.prompts)]
            else:
                length = self.prompt_tokens.draw(rng)
                if self.max_context:
                    output = min(output, self.max_context - 1)
                    length = min(length, self.max_context - output)
                prompt = (*prefix[:length], *self._random_ids(rng, length - len(prefix)))
            yield Job(prompt, output, rng.getrandbits(63))
            number += 1

    def _random_ids(self, rng: random.Random, count: int) -> tuple[int, ...]:
        first = min(_FIRST_ORDINARY_ID, self.vocab_size - 1)
        return tuple(rng.randrange(first, self.vocab_size) for _ in range(max(0, count)))


def _configured(model: Path, name: str) -> int:
    config = json.loads((model / "config.json").read_bytes())
    value = config.get(name) or config.get("text_config", {}).get(name)
    if not isinstance(value, int):
        raise ValueError(f"{model}/config.json names no {name}")
    return value
