"""The stopwatch: on streams made by hand, and on sources that behave in known ways."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

import pytest

from baton.bench.streams import Stall, Stream, draw_prompts, stall, summarize, together

MS = 1_000_000


def stream(sent: int, *arrivals: int, tokens: int) -> Stream:
    """Times in ms."""
    return Stream(sent * MS, [arrival * MS for arrival in arrivals], tokens)


def test_throughput_counts_from_the_first_request_to_the_last_token() -> None:
    result = summarize([stream(0, 100, 200, 300, tokens=3), stream(10, 160, 260, 500, tokens=3)], 3)
    assert result.streams == 2
    assert result.tokens_per_second == pytest.approx(6 / 0.5)
    assert result.ttft_ms == 125
    # From 160 ms on both run: 200 and 300, 260 and 500 come after, and the gaps that end after are counted.
    assert result.decode_tokens_per_second == pytest.approx(4 / 0.34)
    assert result.gap_ms == 100


def test_several_tokens_of_one_message_all_count() -> None:
    result = summarize([stream(0, 100, 200, tokens=8)], 8)
    assert result.tokens_per_second == pytest.approx(40)
    assert result.decode_tokens_per_second == pytest.approx(40)


def test_one_token_has_no_gap() -> None:
    result = summarize([stream(0, 50, tokens=1)], 1)
    assert (result.ttft_ms, result.gap_ms, result.decode_tokens_per_second) == (50, 0, 0)


def test_an_answer_of_another_length_is_no_result() -> None:
    with pytest.raises(ValueError, match="2 tokens, not 3"):
        summarize([stream(0, 1, 2, tokens=2)], 3)


def test_gaps_of_an_interval_are_those_that_touch_it() -> None:
    one = stream(0, 10, 20, 60, 70, tokens=4)
    assert one.gaps(25 * MS, 50 * MS) == [(20 * MS, 60 * MS)]
    assert one.gaps(60 * MS) == [(60 * MS, 70 * MS)]


def test_prompts_are_drawn_again_with_the_same_seed_and_begin_differently() -> None:
    prompts = draw_prompts(6, 10, 5000, seed=3)
    assert prompts == draw_prompts(6, 10, 5000, seed=3) != draw_prompts(6, 10, 5000, seed=4)
    assert len({prompt[:4] for prompt in prompts}) == 6
    assert all(0 <= token < 5000 for prompt in prompts for token in prompt)


class Turns:
    """One thing at a time: a token takes 2 ms, a long prompt `prefill` seconds in which nobody gets a token."""

    def __init__(self, prefill: float) -> None:
        self.prefill = prefill
        self.turn = asyncio.Lock()
        self.ended = 0

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        try:
            for number in range(output_tokens):
                async with self.turn:
                    await asyncio.sleep(self.prefill if not number and len(prompt) > 100 else 0.002)
                yield 1
        finally:
            self.ended += 1


async def test_a_stall_is_the_longest_gap_while_a_long_prompt_is_served() -> None:
    source = Turns(prefill=0.2)
    prompts = draw_prompts(2, 8, 1000, 0)
    result = await stall(source, prompts, draw_prompts(2, 200, 1000, 1), quiet_seconds=0.1, longest=10_000)
    assert isinstance(result, Stall)
    assert (result.streams, result.prompt_tokens) == (2, 200)
    assert result.worst_gap_of_all_ms >= result.worst_gap_ms >= 199
    assert result.ttft_ms >= 199
    assert result.ratio == result.worst_gap_ms / result.undisturbed_gap_ms > 1
    assert source.ended == 4  # the running ones were cancelled


async def test_a_stream_that_ends_begins_anew_and_one_that_fails_ends_the_measurement() -> None:
    running, arriving = draw_prompts(2, 8, 1000, 0), draw_prompts(1, 200, 1000, 1)
    source = Turns(0.01)
    result = await stall(source, running, arriving, quiet_seconds=0.2, longest=5)
    assert source.ended > 4
    assert result.worst_gap_ms > 0

    class Broken(Turns):
        async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
            yield 1
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        await stall(Broken(0.01), running, arriving, quiet_seconds=0.2)


async def test_all_are_asked_at_once() -> None:
    class Meeting:
        """Answers when all eight are there."""

        def __init__(self) -> None:
            self.here = asyncio.Barrier(8)

        async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
            await self.here.wait()
            for _ in itertools.repeat(None, output_tokens):
                yield 1

    result = await asyncio.wait_for(together(Meeting(), draw_prompts(8, 4, 1000, 0), 3), 20)
    assert result.streams == 8
