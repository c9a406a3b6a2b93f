"""Questions the tiny model works out rather than remembers: sums, differences, counting, repeating words."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tiny_model import facts
from tiny_model.facts import Row


@dataclass(frozen=True, slots=True)
class Task:
    """Rows drawn by chance, asked about as a `phrasings.Topic` is.

    Attributes:
        name: category in the evaluation's table.
        draw: a row of texts for the phrasings.
        train: phrasings of the question to train on.
        held_out: phrasings only the evaluation uses.
        answer: the one right answer.
        statement: the answer as plain text, with a bar where a raw prompt ends; empty where there is none.
    """

    name: str
    draw: Callable[[random.Random], Row]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    statement: str = ""


LARGEST_SUMMAND = 12
LARGEST_COUNT = 20
LONGEST_COUNT = 10
MOST_WORDS = 6
_REPEATED = sorted(
    {
        *facts.WORDS,
        *facts.NAMES,
        *(word for table in (facts.CAPITALS, facts.OPPOSITES, facts.PLURALS) for row in table for word in row),
    }
)


def _draw_sum(rng: random.Random) -> Row:
    one, other = rng.randint(0, LARGEST_SUMMAND), rng.randint(0, LARGEST_SUMMAND)
    return str(one), str(other), str(one + other)


def _draw_difference(rng: random.Random) -> Row:
    less, more = sorted((rng.randint(0, LARGEST_SUMMAND), rng.randint(0, LARGEST_SUMMAND)))
    return str(more), str(less), str(more - less)


def _draw_count(rng: random.Random) -> Row:
    first = 1 if rng.random() < 0.3 else rng.randint(1, LARGEST_COUNT - 2)
    last = rng.randint(first + 2, min(first + LONGEST_COUNT - 1, LARGEST_COUNT))
    return str(first), str(last), ", ".join(str(number) for number in range(first, last + 1))


def _draw_words(rng: random.Random) -> Row:
    return (" ".join(rng.sample(_REPEATED, rng.randint(1, MOST_WORDS))),)


SUMS = Task(
    "sums",
    _draw_sum,
    train=(
        "what is {0} plus {1}?",
        "what is {0} + {1}?",
        "{0} + {1} = ?",
        "{0} + {1}",
        "add {0} and {1}.",
        "how much is {0} plus {1}?",
        "what is the sum of {0} and {1}?",
        "{0} plus {1} is what?",
        "tell me the sum of {0} and {1}.",
        "calculate {0} + {1}.",
        "can you add {0} and {1}?",
        "what do you get when you add {0} and {1}?",
        "do you know what {0} plus {1} is?",
        "I have {0} and get {1} more. How many do I have?",
    ),
    held_out=(
        "how much is {0} + {1}?",
        "tell me what {0} plus {1} is.",
        "what do I get when I add {0} and {1}?",
        "calculate the sum of {0} and {1}.",
    ),
    answer="{0} plus {1} is {2}.",
    statement="{0} plus {1} is| {2}.",
)

DIFFERENCES = Task(
    "differences",
    _draw_difference,
    train=(
        "what is {0} minus {1}?",
        "what is {0} - {1}?",
        "{0} - {1} = ?",
        "{0} - {1}",
        "subtract {1} from {0}.",
        "how much is {0} minus {1}?",
        "{0} minus {1} is what?",
        "take {1} away from {0}.",
        "calculate {0} - {1}.",
        "can you subtract {1} from {0}?",
        "tell me {0} minus {1}.",
        "do you know what {0} minus {1} is?",
        "I have {0} and give away {1}. How many are left?",
    ),
    held_out=(
        "how much is {0} - {1}?",
        "tell me what {0} minus {1} is.",
        "can you take {1} away from {0}?",
        "calculate {0} minus {1}.",
    ),
    answer="{0} minus {1} is {2}.",
    statement="{0} minus {1} is| {2}.",
)

COUNTING = Task(
    "counting",
    _draw_count,
    train=(
        "count from {0} to {1}.",
        "can you count from {0} to {1}?",
        "count up from {0} to {1}.",
        "list the numbers from {0} to {1}.",
        "name the numbers from {0} to {1}.",
        "which numbers are from {0} to {1}?",
        "say the numbers from {0} up to {1}.",
        "start at {0} and count to {1}.",
        "write the numbers from {0} to {1}.",
        "I want to hear you count from {0} to {1}.",
        "start with {0} and stop at {1}. Count!",
        "numbers from {0} to {1}?",
    ),
    held_out=(
        "please count from {0} up to {1}.",
        "tell me the numbers from {0} to {1}.",
        "start with {0} and count up to {1}.",
        "write down all numbers from {0} to {1}.",
    ),
    answer="{2}.",
    statement="Counting from {0} to {1}:| {2}.",
)

REPEATING = Task(
    "repeating",
    _draw_words,
    train=(
        "repeat: {0}",
        "repeat after me: {0}",
        "say this: {0}",
        "please repeat these words: {0}",
        "repeat the words {0}.",
        "write these words: {0}",
        "copy this: {0}",
        "can you repeat this? {0}",
        "say the words {0}.",
        "copy the words {0}.",
        "echo: {0}",
        "I say {0}. What did I say?",
    ),
    held_out=(
        "say after me: {0}",
        "please say these words: {0}",
        "repeat this: {0}",
        "copy these words: {0}",
    ),
    answer="{0}",
)

TASKS: tuple[Task, ...] = (SUMS, DIFFERENCES, COUNTING, REPEATING)
