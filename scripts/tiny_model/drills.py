"""Drills: words and numbers in no order, to be said again or looked up.

Most answers of the corpus can be learned by heart, so that a network is slow to find out that it can look back. Here
that is all there is to learn, and at every word; with drills early in the training, stories and sums come soon after.
"""

from __future__ import annotations

import random

from tiny_model import facts, stories
from tiny_model.document import Document, Turn

_SAID = sorted(
    {*facts.WORDS, *stories.COLOURS, *stories.THINGS, *stories.PLACES, *stories.FOODS, *stories.PETS, *facts.NAMES}
    | {word for table in (facts.CAPITALS, facts.OPPOSITES, facts.PLURALS) for row in table for word in row}
)


def drill(rng: random.Random) -> Document:
    """A list to repeat, or pairs in which to look up what belongs to a word."""
    return _repetition(rng) if rng.random() < 0.6 else _lookup(rng)


def _things(rng: random.Random, count: int) -> list[str]:
    words = rng.sample(_SAID, count)
    return [str(rng.randint(0, 99)) if rng.random() < 0.2 else word for word in words]


def _repetition(rng: random.Random) -> Document:
    said = " ".join(_things(rng, rng.randint(2, 20)))
    return Document("drills", turns=(Turn("user", said), Turn("assistant", said)))


def _lookup(rng: random.Random) -> Document:
    """The first word of a pair is asked for in each turn, the second is the answer."""
    count = rng.randint(2, 7)
    pairs = list(zip(rng.sample(_SAID, count), _things(rng, count), strict=True))
    told = rng.choice((" ", " is ", " has ", ": "))
    turns = []
    for i, (key, value) in enumerate(rng.sample(pairs, count)):
        asked = ". ".join(f"{one}{told}{other}" for one, other in pairs) + f".\n{key}?" if i == 0 else f"{key}?"
        turns += [Turn("user", asked), Turn("assistant", f"{key}{told}{value}.")]
    return Document("drills", turns=tuple(turns))
