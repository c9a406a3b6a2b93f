"""How the tiny model is asked about its facts: phrasings to train on, and others kept for the evaluation.

A phrasing is a format string over a row of `facts`. The two sets of a topic are disjoint, and what is measured is the
held-out one: the model knows the fact, but has never seen the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny_model import facts


@dataclass(frozen=True, slots=True)
class Topic:
    """Facts of one kind.

    Attributes:
        name: category in the evaluation's table.
        rows: the facts.
        train: phrasings of the question to train on.
        held_out: phrasings only the evaluation uses.
        answer: the one right answer.
        statement: the fact as plain text; what follows the bar is what a raw prompt should be continued with.
    """

    name: str
    rows: tuple[facts.Row, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    statement: str


CAPITALS = Topic(
    "capitals",
    facts.CAPITALS,
    train=(
        "what is the capital of {0}?",
        "which city is the capital of {0}?",
        "name the capital of {0}.",
        "what is the capital city of {0}?",
        "what city is {0}'s capital?",
        "tell me the capital of {0}.",
        "do you know the capital of {0}?",
        "{0}: what is the capital?",
        "I need the capital of {0}.",
        "the capital of {0} is which city?",
        "what is {0}'s capital city called?",
        "capital of {0}?",
        "in {0}, which city is the capital?",
        "I am going to {0}. What is its capital?",
    ),
    held_out=(
        "what is {0}'s capital?",
        "which city is {0}'s capital city?",
        "please name the capital city of {0}.",
        "do you know what the capital of {0} is called?",
    ),
    answer="The capital of {0} is {1}.",
    statement="The capital of {0} is| {1}.",
)

COUNTRIES = Topic(
    "countries",
    facts.CAPITALS,
    train=(
        "{1} is the capital of which country?",
        "which country has the capital {1}?",
        "{1} is the capital of what country?",
        "of which country is {1} the capital?",
        "what country is {1} the capital of?",
        "in which country is {1}?",
        "where is {1}?",
        "name the country whose capital is {1}.",
        "which country is {1} in?",
        "tell me which country {1} belongs to.",
        "the city {1} is in which country?",
        "I live in {1}. Which country is that?",
    ),
    held_out=(
        "in what country is the city {1}?",
        "which country is {1} the capital of?",
        "tell me the country whose capital is {1}.",
        "what country is {1} in?",
    ),
    answer="{1} is the capital of {0}.",
    statement="{1} is the capital of| {0}.",
)

COLOURS = Topic(
    "colours",
    facts.COLOURS,
    train=(
        "what colour {1} {0}?",
        "what color {1} {0}?",
        "which colour {1} {0}?",
        "tell me the colour of {0}.",
        "tell me which color {0} {1}.",
        "what is the colour of {0}?",
        "what is the color of {0}?",
        "name the colour of {0}.",
        "what colour does {0} have?",
        "do you know the colour of {0}?",
        "the colour of {0}?",
        "if I paint {0}, which colour do I need?",
        "think of {0}. What colour do you see?",
    ),
    held_out=(
        "which colour does {0} have?",
        "do you know what colour {0} {1}?",
        "which color {1} {0}?",
        "tell me what color {0} {1}.",
    ),
    answer="{0} {1} {2}.",
    statement="The colour of {0} is| {2}.",
)

OPPOSITES = Topic(
    "opposites",
    facts.OPPOSITES,
    train=(
        "what is the opposite of {0}?",
        "name the opposite of {0}.",
        "opposite of {0}?",
        "tell me the opposite of {0}.",
        "which word is the opposite of {0}?",
        "what word means the opposite of {0}?",
        "give me the opposite of {0}.",
        "{0} is the opposite of what?",
        "{0} is the opposite of what word?",
        "do you know the opposite of {0}?",
        "what is the opposite of the word {0}?",
        "if it is not {0}, what is the opposite?",
        "{0}: what is the opposite?",
    ),
    held_out=(
        "the opposite of {0} is what?",
        "give me the word that is the opposite of {0}.",
        "{0} is the opposite of which word?",
        "what would be the opposite of {0}?",
    ),
    answer="The opposite of {0} is {1}.",
    statement="The opposite of {0} is| {1}.",
)

PLURALS = Topic(
    "plurals",
    facts.PLURALS,
    train=(
        "what is the plural of {0}?",
        "plural of {0}?",
        "name the plural of {0}.",
        "tell me the plural of {0}.",
        "one {0}, two what?",
        "one {0}, several what?",
        "first one {0}, then three what?",
        "give me the plural of {0}.",
        "what is the plural form of {0}?",
        "how do you say more than one {0}?",
        "what do you call many of a {0}?",
        "do you know the plural of {0}?",
        "which word is the plural of {0}?",
        "{0}: what is the plural?",
        "a {0}, many what?",
        "here is one {0}; there are many what?",
    ),
    held_out=(
        "give me the plural form of {0}.",
        "the plural of {0} is what?",
        "what do you call more than one {0}?",
        "one {0}, many what?",
    ),
    answer="The plural of {0} is {1}.",
    statement="The plural of {0} is| {1}.",
)

SOUNDS = Topic(
    "sounds",
    facts.SOUNDS,
    train=(
        "what does a {0} say?",
        "what sound does a {0} make?",
        "which sound does a {0} make?",
        "what noise does a {0} make?",
        "tell me the sound of a {0}.",
        "what is the sound of a {0}?",
        "how does a {0} sound?",
        "what do you hear from a {0}?",
        "sound of a {0}?",
        "a {0} makes which sound?",
        "do you know what a {0} says?",
        "make the sound of a {0}.",
    ),
    held_out=(
        "which noise does a {0} make?",
        "tell me what a {0} says.",
        "do you know the sound of a {0}?",
        "what sound do you hear from a {0}?",
    ),
    answer="A {0} says {1}.",
    statement="A {0} says| {1}.",
)

ORDER = Topic(
    "days and months",
    facts.ORDER,
    train=(
        "which {0} comes {1} {2}?",
        "what {0} is {1} {2}?",
        "what {0} comes {1} {2}?",
        "which {0} is {1} {2}?",
        "name the {0} {1} {2}.",
        "tell me the {0} {1} {2}.",
        "what is the {0} {1} {2}?",
        "what comes {1} {2}?",
        "the {0} {1} {2}?",
        "do you know the {0} {1} {2}?",
        "which {0} is right {1} {2}?",
        "what {0} comes right {1} {2}?",
        "name the {0} that comes right {1} {2}.",
        "I know {2}. Which {0} is {1} it?",
    ),
    held_out=(
        "what is the name of the {0} {1} {2}?",
        "which {0} comes right {1} {2}?",
        "tell me which {0} is {1} {2}.",
        "do you know which {0} comes {1} {2}?",
    ),
    answer="The {0} {1} {2} is {3}.",
    statement="The {0} {1} {2} is| {3}.",
)

TOPICS: tuple[Topic, ...] = (CAPITALS, COUNTRIES, COLOURS, OPPOSITES, PLURALS, SOUNDS, ORDER)
