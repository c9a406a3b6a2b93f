"""The text of requests in spans: in the conventions' form, bounded in bytes, and valid JSON wherever it is cut."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import sampling_pb2
from baton_router.app import _records_prompts
from baton_router.settings import RouterSettings
from baton_router.transcript import Transcript, fitted

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=8)


def test_the_conventions_form() -> None:
    assert json.loads(fitted([("system", "Be brief."), ("user", '日\n"quoted"')], 1000)) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": '日\n"quoted"'}]},
    ]


@given(messages=MESSAGES, limit=st.integers(2, 400))
def test_what_fits_is_kept_and_no_more(messages: list[tuple[str, str]], limit: int) -> None:
    found = fitted(messages, limit, finish_reason="stop")
    assert len(found.encode()) <= limit
    kept = [(message["role"], message["parts"][0]["content"]) for message in json.loads(found)]
    whole = fitted(messages, 100_000, finish_reason="stop")
    if len(whole.encode()) < limit:
        assert found == whole
    # The first ones, as they are; only the last may be cut.
    assert kept[:-1] == messages[: len(kept)][:-1]
    for (role, text), (expected_role, expected) in zip(kept, messages, strict=False):
        assert role == expected_role
        assert expected.startswith(text)


def test_a_cut_text_fills_its_room() -> None:
    """ "é" takes two bytes and a line's end two characters of JSON."""
    for text in ("x" * 1000, "é" * 1000, "\n" * 1000):
        found = fitted([("user", text)], 300)
        assert 298 <= len(found.encode()) <= 300
        assert len(fitted([("user", text), ("user", text)], 300)) == len(found)


def test_an_endless_answer_is_held_only_as_far_as_it_is_told() -> None:
    transcript = Transcript(256)
    for _ in range(1000):
        transcript.answer("word ")
    assert sum(len(part) for part in transcript._answer) < 256 + 5
    transcript.end(sampling_pb2.FINISH_REASON_STOP)


@pytest.mark.parametrize(
    ("flags", "recorded", "warning"),
    [
        ({}, False, None),
        ({"otlp_endpoint": "collector:4317"}, False, None),
        ({"record_prompts": True}, False, "does nothing"),
        ({"record_prompts": True, "otlp_endpoint": "collector:4317"}, True, "collector:4317"),
    ],
)
def test_it_is_off_unless_asked_for_and_says_so(
    flags: dict[str, object], recorded: bool, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _records_prompts(RouterSettings(**flags)) is recorded  # type: ignore[arg-type]
    assert [warning in message for message in caplog.messages] == ([] if warning is None else [True])
