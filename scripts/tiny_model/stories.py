"""Small stories, each with questions that only its text can answer, from two sentences to several paragraphs."""

# ruff: noqa: SIM905 tables read better as text

from __future__ import annotations

import random
from dataclasses import dataclass

from tiny_model import facts
from tiny_model.scenery import SCENERY

COLOURS = "red blue green yellow white black brown pink grey purple golden silver".split()
THINGS = (
    "ball kite boat hat jacket lamp basket bottle piano guitar drum violin bicycle train truck book letter pillow"
    " blanket mirror key box car chair spoon cup plate button rocket hammer"
).split()
PLACES = (
    "kitchen garden forest castle market tower school library park village city meadow valley desert harbour station"
    " museum bakery barn attic"
).split()
FOODS = "bread honey cheese rice pasta soup cake salt butter pepper sugar grapes plums carrots apples bananas".split()
PETS = "dog cat rabbit horse bird goat duck pig mouse turtle parrot camel".split()


@dataclass(frozen=True, slots=True)
class Kind:
    """One thing to know about a person in a story.

    Attributes:
        told: sentences that tell it, over name, colour and word.
        train: questions to train on.
        held_out: questions only the evaluation uses.
        answer: the one right answer.
        words: what there is to tell.
    """

    told: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    words: tuple[str, ...]


_THING_TOLD = (
    "{name} has a {colour} {word}.",
    "{name} owns a {colour} {word}.",
    "{name} found a {colour} {word}.",
    "{name} bought a {colour} {word}.",
)
WHO_HAS = Kind(
    _THING_TOLD,
    (
        "who has the {word}?",
        "who has a {word}?",
        "whose is the {word}?",
        "name the person who has the {word}.",
        "who is the owner of the {word}?",
        "tell me who has a {word}.",
        "the {word} belongs to whom?",
    ),
    ("tell me who has the {word}.", "who is the person who has the {word}?", "do you know who has the {word}?"),
    "{name} has the {word}.",
    tuple(THINGS),
)
WHAT_HAS = Kind(
    _THING_TOLD,
    (
        "what does {name} have?",
        "what thing does {name} have?",
        "which thing does {name} have?",
        "what has {name} got?",
        "tell me what thing {name} has.",
        "what is it that {name} has?",
        "name the thing {name} has.",
    ),
    ("tell me what {name} has.", "which thing has {name} got?", "do you know what {name} has?"),
    "{name} has a {colour} {word}.",
    tuple(THINGS),
)
COLOUR_OF = Kind(
    _THING_TOLD,
    (
        "what colour is the {word}?",
        "what colour is {name}'s {word}?",
        "which colour is the {word}?",
        "tell me the colour of the {word}.",
        "what is the colour of the {word}?",
        "name the colour of the {word}.",
        "what color is the {word}?",
    ),
    ("which colour does the {word} have?", "do you know what colour the {word} is?", "which color is the {word}?"),
    "The {word} is {colour}.",
    tuple(THINGS),
)
WHERE_IS = Kind(
    (
        "{name} is in the {word}.",
        "{name} went to the {word}.",
        "{name} walked to the {word}.",
        "{name} is at the {word}.",
    ),
    (
        "where is {name}?",
        "where can I find {name}?",
        "in which place is {name}?",
        "at which place is {name}?",
        "where did {name} go?",
        "tell me the place where {name} is.",
        "do you know the place where {name} is?",
    ),
    ("tell me where {name} is.", "do you know where {name} is?", "in what place is {name}?"),
    "{name} is in the {word}.",
    tuple(PLACES),
)
EATS = Kind(
    ("{name} likes {word}.", "{name} eats {word}.", "{name} loves to eat {word}.", "For lunch {name} has {word}."),
    (
        "what does {name} eat?",
        "what food does {name} like?",
        "which food does {name} eat?",
        "what does {name} like to eat?",
        "tell me what {name} likes to eat.",
        "name the food {name} eats.",
        "what is the food {name} eats?",
    ),
    ("tell me what {name} eats.", "which food does {name} like?", "do you know what {name} likes to eat?"),
    "{name} eats {word}.",
    tuple(FOODS),
)
PET_OF = Kind(
    ("{name} lives with a {word}.", "{name} has a pet {word}.", "{name} plays with a pet {word}."),
    (
        "what pet does {name} have?",
        "which animal lives with {name}?",
        "which pet does {name} have?",
        "what is the pet of {name}?",
        "what animal does {name} have?",
        "tell me the pet of {name}.",
        "name {name}'s pet.",
    ),
    ("what is {name}'s pet?", "which animal does {name} have?", "tell me what pet {name} has."),
    "{name} has a pet {word}.",
    tuple(PETS),
)
_THING_KINDS = (WHO_HAS, WHAT_HAS, COLOUR_OF)
_OTHER_KINDS = (WHERE_IS, EATS, PET_OF)


@dataclass(frozen=True, slots=True)
class Known:
    """What a story tells: a person, and a word, which no one else in the story shares."""

    kinds: tuple[Kind, ...]
    fields: dict[str, str]

    def ask(self, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
        """A question about it and the answer."""
        kind = rng.choice(self.kinds)
        question = rng.choice(kind.held_out if held_out else kind.train).format(**self.fields)
        return question, kind.answer.format(**self.fields)


@dataclass(frozen=True, slots=True)
class Story:
    """A story's text and what one can ask about it."""

    text: str
    known: tuple[Known, ...]


def short_story(rng: random.Random) -> Story:
    """Two to five sentences."""
    told = _tell(rng, people=rng.randint(2, 4), most=rng.randint(2, 4))
    opening = [rng.choice(SCENERY)] if rng.random() < 0.3 else []
    return Story(" ".join(opening + [text for text, _ in told]), tuple(known for _, known in told))


def long_story(rng: random.Random, sentences: int | None = None) -> Story:
    """Several paragraphs, up to some 400 tokens; most of it is scenery.

    Args:
        sentences: how many in all; None: by chance, 8 to 48.
    """
    count = sentences or rng.randint(8, 48)
    told = _tell(rng, people=rng.randint(3, 6), most=rng.randint(3, 5))
    lines = [text for text, _ in told] + rng.choices(SCENERY, k=max(0, count - len(told)))
    rng.shuffle(lines)
    paragraphs: list[str] = []
    while lines:
        size = rng.randint(4, 8)
        paragraphs.append(" ".join(lines[:size]))
        lines = lines[size:]
    return Story("\n\n".join(paragraphs), tuple(known for _, known in told))


def _tell(rng: random.Random, *, people: int, most: int) -> list[tuple[str, Known]]:
    """Sentences with what they tell: at most one of a kind for a person, and no word twice."""
    names = rng.sample(facts.NAMES, people)
    wishes = [(name, kinds) for name in names for kinds in (_THING_KINDS, *((kind,) for kind in _OTHER_KINDS))]
    told: list[tuple[str, Known]] = []
    used: set[str] = set()
    for name, kinds in rng.sample(wishes, min(most, len(wishes))):
        word = rng.choice([word for word in kinds[0].words if word not in used])
        used.add(word)
        fields = {"name": name, "word": word, "colour": rng.choice(COLOURS)}
        told.append((rng.choice(kinds[0].told).format(**fields), Known(kinds, fields)))
    return told
