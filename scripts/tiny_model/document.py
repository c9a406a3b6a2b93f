"""A piece of the corpus: a conversation, or plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SEEN = "plain statements"
"""The one topic of the evaluation that is not held out: the model has seen these texts."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """What the model reads at once: either turns of a conversation, or a plain text.

    Attributes:
        topic: category in the evaluation's table.
        turns: the conversation, empty for a plain text.
        text: the plain text, empty for a conversation.
    """

    topic: str
    turns: tuple[Turn, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        if bool(self.turns) == bool(self.text):
            raise ValueError("a document is either a conversation or a plain text")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the evaluation.

    Attributes:
        topic: category in the evaluation's table.
        prompt: the user's turn, or, where `raw` is set, the beginning of a plain text.
        answer: the one right answer; for a raw prompt what the text must go on with.
        raw: whether the prompt goes to the model without the chat template.
    """

    topic: str
    prompt: str
    answer: str
    raw: bool = False


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
