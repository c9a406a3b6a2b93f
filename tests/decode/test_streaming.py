"""An answer's messages: every token once and in order, in as many messages as its reader's pace allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.handle import EngineDied, RequestHandle
from baton.engine.messages import Command, Failed, FailureReason, FinishReason, Output
from baton.internal.v1 import decode_pb2
from baton.text.tokenizer import Tokenizer
from baton.v1 import ledger_pb2, sampling_pb2
from baton.worker.trials import Trials
from baton_decode import run as run_module
from baton_decode.answer import Answer
from baton_decode.run import Run, StepFailed
from baton_decode.spacing import Spacing
from tests.text.conftest import byte_fallback, byte_level

PLENTY = 1e9
"""Messages a second that nobody reaches: no token waits for another."""
FEW = 1e-9
"""Messages a second that anybody exceeds: every token but the first waits as long as one may."""
LONG = 30.0
"""Seconds; whatever does not wait so long did not wait for a timer."""
MS = 1_000_000
LENGTH = sampling_pb2.FINISH_REASON_LENGTH

TOKENIZERS = [Tokenizer(make().to_str().encode()) for make in (byte_level, byte_fallback)]
WORDS = TOKENIZERS[0].encode_plain("the quick brown fox 🙂 jumps over naïve dogs")


def a_request(tokenizer: Tokenizer, **sampling: Any) -> decode_pb2.GenerateRequest:
    return decode_pb2.GenerateRequest(
        request_id="r",
        token_ids=tokenizer.encode("the fox"),
        sampling=sampling_pb2.SamplingParams(
            max_tokens=1000,
            min_tokens=0,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            seed=1,
            ignore_eos=True,
            **sampling,
        ),
    )


class Engine:
    """What a handle needs of its engine. The tests are the engine."""

    def __init__(self) -> None:
        self.dead = False
        self.epitaph = "it is gone"

    def send(self, command: Command) -> None:
        raise AssertionError("nothing is sent while tokens come")


class Front:
    """One request that decodes."""

    def __init__(self, rate: float) -> None:
        self.engine = Engine()
        self.handle = RequestHandle(self.engine, "r")
        self.run = Run(TOKENIZERS[0], a_request(TOKENIZERS[0]))
        self.messages = self.run.stream(self.handle, Spacing(rate), Trials(10.0))
        self.text = ""
        self._made = 0

    def step(self, *, last: bool = False) -> None:
        """The engine makes the next of WORDS."""
        token_id, self._made = WORDS[self._made], self._made + 1
        reason = FinishReason.LENGTH if last else None
        self.handle.push(
            Output(
                request_id="r",
                index=self._made - 1,
                token_ids=[token_id],
                finish_reason=reason,
                compute_ns=self._made * MS,
            )
        )

    async def next(self) -> list[int]:
        """The tokens of the next message."""
        message = await anext(self.messages)
        assert message.tokens.index + len(message.tokens.token_ids) == len(self.run.answer.token_ids)
        self.text += message.tokens.text
        return list(message.tokens.token_ids)


@asynccontextmanager
async def front(rate: float) -> AsyncIterator[Front]:
    one = Front(rate)
    async with aclosing(one.messages):
        yield one


async def turns() -> None:
    """Everybody else gets their turn, many times over."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_fast_reader_gets_a_message_for_every_step() -> None:
    async with front(PLENTY) as one:
        for token_id in WORDS[:10]:
            coming = asyncio.create_task(one.next())
            await turns()
            assert not coming.done()
            one.step()
            assert await coming == [token_id]


async def test_a_slow_reader_gets_what_is_there() -> None:
    async with front(PLENTY) as one:
        one.step()
        assert await one.next() == WORDS[:1]
        for _ in range(2, len(WORDS)):
            one.step()
        one.step(last=True)
        assert await one.next() == WORDS[1:]
        with pytest.raises(StopAsyncIteration):
            await one.next()
        assert one.text == TOKENIZERS[0].decode(WORDS)
        assert one.run.finished().finish_reason == LENGTH


async def test_the_first_token_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LONGEST", LONG)
    async with front(FEW) as one, asyncio.timeout(LONG / 2):
        coming = asyncio.create_task(one.next())
        await turns()
        one.step()
        assert await coming == WORDS[:1]


async def test_the_end_never_waits_and_brings_what_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LONGEST", LONG)
    monkeypatch.setattr(Spacing, "seconds", lambda self: LONG)
    async with front(FEW) as one, asyncio.timeout(LONG / 2):
        one.step()
        await one.next()
        coming = asyncio.create_task(one.next())
        for _ in range(3):
            await turns()
            one.step()
        await turns()
        assert not coming.done(), "they wait for each other"
        one.step(last=True)
        assert await coming == WORDS[1:5]


async def test_tokens_do_not_wait_for_ever() -> None:
    """Nothing comes after them, and they leave all the same."""
    async with front(FEW) as one, asyncio.timeout(LONG):
        one.step()
        await one.next()
        coming = asyncio.create_task(one.next())
        await turns()
        one.step()
        assert await coming == WORDS[1:2]


async def test_what_came_before_a_failure_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spacing, "seconds", lambda self: LONG)
    async with front(FEW) as one, asyncio.timeout(LONG / 2):
        one.step()
        await one.next()
        one.step()
        one.step()
        one.handle.push(Failed("r", FailureReason.INTERNAL, "broken"))
        assert await one.next() == WORDS[1:3]
        with pytest.raises(StepFailed, match="broken"):
            await one.next()


async def test_what_came_before_the_engine_died_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LONGEST", LONG)
    monkeypatch.setattr(Spacing, "seconds", lambda self: LONG)
    async with front(FEW) as one, asyncio.timeout(LONG / 2):
        one.step()
        await one.next()
        coming = asyncio.create_task(one.next())
        await turns()
        one.step()
        one.engine.dead = True
        one.handle.wake()
        assert await coming == WORDS[1:2]
        with pytest.raises(EngineDied):
            await one.next()


async def test_shared_messages_book_the_engines_time_once() -> None:
    async with front(PLENTY) as one:
        coming = asyncio.create_task(one.next())
        await asyncio.sleep(0.05)  # more than the engine says it took
        for _ in range(9):
            one.step()
        one.step(last=True)
        assert await coming == WORDS[:10]
        timing = one.run.finished().timing
    spent = {entry.kind: entry.duration_ns for entry in timing.entries}
    assert spent[ledger_pb2.KIND_COMPUTE] == 10 * MS
    assert sum(spent.values()) == timing.total_ns


def whole(answer: Answer, pieces: Sequence[Sequence[int]]) -> tuple[str, list[int], int]:
    """Text, tokens and end of an answer whose tokens come in these pieces; the last one ends it."""
    text = ""
    for i, piece in enumerate(pieces):
        assert answer.token_ids == [id_ for earlier in pieces[:i] for id_ in earlier]
        text += answer.take(piece, LENGTH if i == len(pieces) - 1 else sampling_pb2.FINISH_REASON_UNSPECIFIED).text
        if answer.finished:
            break
    return text, answer.token_ids, answer.finish_reason


@settings(deadline=None)
@given(
    tokenizer=st.sampled_from(TOKENIZERS),
    text=st.text(st.sampled_from("the fox.é日🙂 \n"), min_size=1, max_size=40),
    stop=st.lists(st.text("the fox", min_size=1, max_size=3), max_size=2),
    cuts=st.sets(st.integers(1, 60)),
)
def test_any_split_is_the_same_answer(tokenizer: Tokenizer, text: str, stop: list[str], cuts: set[int]) -> None:
    token_ids = tokenizer.encode_plain(text)
    inner = sorted(cut for cut in cuts if cut < len(token_ids))
    pieces = [token_ids[a:b] for a, b in zip([0, *inner], [*inner, len(token_ids)], strict=True)]
    request = a_request(tokenizer, stop=stop)
    one_by_one = whole(Answer(tokenizer, request), [[token_id] for token_id in token_ids])
    assert whole(Answer(tokenizer, request), pieces) == one_by_one
