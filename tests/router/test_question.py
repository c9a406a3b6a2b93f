"""What of a prompt may be worded differently."""

from __future__ import annotations

import pytest

from baton.rpc.errors import InvalidArgument
from baton_router.question import question_of
from baton_router.validate import Turn


def turns(*said: str) -> list[Turn]:
    """`role:text` each."""
    return [Turn(*one.split(":", 1)) for one in said]


def test_a_text_is_the_question() -> None:
    assert question_of("the fox").text == "the fox"
    assert question_of("the fox").context == question_of("a hare").context


def test_the_last_message_of_the_user_is_the_question() -> None:
    asked = question_of(turns("system:be brief", "user:hi", "assistant:hello", "user:why?"))
    assert asked.text == "why?"
    assert asked.context == question_of(turns("system:be brief", "user:hi", "assistant:hello", "user:how?")).context
    assert len(asked.context) == 32


@pytest.mark.parametrize(
    "other",
    [
        turns("system:be long", "user:hi", "assistant:hello", "user:why?"),
        turns("system:be brief", "user:hey", "assistant:hello", "user:why?"),
        turns("system:be brief", "user:hi", "assistant:hello", "user:why?", "assistant:be"),
        turns("system:be briefuser", "user:hi", "assistant:hello", "user:why?"),
        turns("system:be brief", "assistant:hi", "assistant:hello", "user:why?"),
        turns("user:hi", "assistant:hello", "user:why?"),
        turns("user:why?"),
    ],
)
def test_all_the_rest_is_context(other: list[Turn]) -> None:
    asked = question_of(turns("system:be brief", "user:hi", "assistant:hello", "user:why?"))
    assert question_of(other).text == "why?"
    assert question_of(other).context != asked.context


def test_a_text_is_not_a_message() -> None:
    assert question_of("why?").context != question_of(turns("user:why?")).context


@pytest.mark.parametrize("prompt", [[5, 6], turns("system:be brief"), turns("assistant:so")])
def test_without_words_of_a_user_there_is_no_question(prompt: list[int] | list[Turn]) -> None:
    with pytest.raises(InvalidArgument, match=r"cache_control\.semantic"):
        question_of(prompt)
