"""Streams of tokens under a stopwatch: how fast several run side by side, and how long a new prompt makes them wait.

Whatever answers prompts is measured by this one file: an engine in process, a mesh, another project's engine. It uses
nothing but Python's own library, so that it runs in an environment of the other's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

Prompt = tuple[int, ...]

_FIRST_ORDINARY_ID = 300
"""Lower token ids may be special ones or single bytes."""


class Source(Protocol):
    """Answers prompts, greedily and to the length asked for."""

    def stream(self, prompt: Prompt, output_tokens: int) -> AsyncGenerator[int, None]:
        """The number of new tokens in every message, as it arrives. To close it is to cancel the request."""
        ...


@dataclass(slots=True)
class Stream:
    """One answer. Times are of one monotonic clock, nanoseconds."""

    sent_ns: int = 0
    arrivals_ns: list[int] = field(default_factory=list)
    """When each message arrived."""
    tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """Time to the first token, milliseconds."""
        return (self.arrivals_ns[0] - self.sent_ns) / 1e6

    def gaps(self, since_ns: int = 0, until_ns: int | None = None) -> list[tuple[int, int]]:
        """(begin, end) of the gaps between messages that end after `since_ns` and begin before `until_ns`."""
        pairs = zip(self.arrivals_ns, self.arrivals_ns[1:], strict=False)
        return [(a, b) for a, b in pairs if b > since_ns and (until_ns is None or a < until_ns)]


@dataclass(frozen=True, slots=True)
class Together:
    """What streams that began at once got."""

    streams: int
    tokens_per_second: float
    """All tokens over the time from the first request to the last token."""
    decode_tokens_per_second: float
    """The same from the moment the last stream had its first token."""
    ttft_ms: float
    """Median."""
    gap_ms: float
    """Median."""


@dataclass(frozen=True, slots=True)
class Stall:
    """What running streams felt of long prompts that arrived, one after the other."""

    streams: int
    prompt_tokens: int
    undisturbed_gap_ms: float
    """Median gap before the first long prompt came."""
    worst_gap_ms: float
    """Median over the long prompts of the longest gap any stream had from its sending to its end."""
    worst_gap_of_all_ms: float
    ttft_ms: float
    """Median of the long prompts."""

    @property
    def ratio(self) -> float:
        """Worst gap over undisturbed gap."""
        return self.worst_gap_ms / self.undisturbed_gap_ms


def draw_prompts(count: int, tokens: int, vocab_size: int, seed: int) -> list[Prompt]:
    """Random prompts, no two of which begin alike, whatever else was drawn: no prefix cache helps."""
    rng = random.Random(f"{count} {tokens} {seed}")
    first = min(_FIRST_ORDINARY_ID, vocab_size // 2)
    return [tuple(rng.randrange(first, vocab_size) for _ in range(tokens)) for _ in range(count)]


async def follow(source: Source, prompt: Prompt, output_tokens: int, stream: Stream) -> Stream:
    """Ask and note every message until the answer ends."""
    stream.sent_ns = time.monotonic_ns()
    async with aclosing(source.stream(prompt, output_tokens)) as messages:
        async for count in messages:
            stream.arrivals_ns.append(time.monotonic_ns())
            stream.tokens += count
    return stream


async def together(source: Source, prompts: Sequence[Prompt], output_tokens: int) -> Together:
    """Ask all prompts at once and wait for all answers.

    Raises:
        ValueError: an answer has another length than asked for.
    """
    streams = await asyncio.gather(*(follow(source, prompt, output_tokens, Stream()) for prompt in prompts))
    return summarize(streams, output_tokens)


def summarize(streams: Sequence[Stream], output_tokens: int) -> Together:
    """The numbers of streams that began at once. Pure.

    Raises:
        ValueError: an answer has another length than asked for.
    """
    for stream in streams:
        if stream.tokens != output_tokens:
            raise ValueError(f"an answer has {stream.tokens} tokens, not {output_tokens}")
    began = min(stream.sent_ns for stream in streams)
    ended = max(stream.arrivals_ns[-1] for stream in streams)
    all_run = max(stream.arrivals_ns[0] for stream in streams)
    running = [stream for stream in streams if stream.arrivals_ns[-1] > all_run]
    late = sum(sum(arrival > all_run for arrival in stream.arrivals_ns) for stream in running)
    messages = sum(len(stream.arrivals_ns) for stream in streams)
    per_message = sum(stream.tokens for stream in streams) / messages
    gaps = [b - a for stream in streams for a, b in stream.gaps(since_ns=all_run)]
    return Together(
        streams=len(streams),
        tokens_per_second=sum(stream.tokens for stream in streams) / ((ended - began) / 1e9),
        decode_tokens_per_second=late * per_message / ((ended - all_run) / 1e9) if late else 0.0,
        ttft_ms=median(stream.ttft_ms for stream in streams),
        gap_ms=median(gaps) / 1e6 if gaps else 0.0,
    )


async def stall(
    source: Source,
    running: Sequence[Prompt],
    arriving: Sequence[Prompt],
    *,
    quiet_seconds: float = 1.0,
    longest: int = 2048,
    answer_tokens: int = 4,
) -> Stall:
    """Let streams run, then send long prompts one after the other.

    Args:
        source: what answers.
        running: prompts of the streams that run all the time.
        arriving: the long prompts.
        quiet_seconds: how long the streams run undisturbed before each long prompt, and twice as long at first.
        longest: tokens of a running stream; one that ends begins anew, so it should last for all long prompts.
        answer_tokens: tokens the long prompts ask for.
    """
    streams: list[Stream] = []
    async with run_along(source, running, longest, streams) as alive:
        began = time.monotonic_ns()
        await asyncio.sleep(2 * quiet_seconds)
        quiet_until = time.monotonic_ns()
        long: list[tuple[Stream, int]] = []
        for prompt in arriving:
            await alive()
            stream = await follow(source, prompt, answer_tokens, Stream())
            long.append((stream, time.monotonic_ns()))
            await asyncio.sleep(quiet_seconds)
        await alive()
    quiet = [b - a for stream in streams for a, b in stream.gaps(began, quiet_until)]
    worst = [max(b - a for s in streams for a, b in s.gaps(arrived.sent_ns, ended)) / 1e6 for arrived, ended in long]
    return Stall(
        streams=len(running),
        prompt_tokens=len(arriving[0]),
        undisturbed_gap_ms=median(quiet) / 1e6,
        worst_gap_ms=median(worst),
        worst_gap_of_all_ms=max(worst),
        ttft_ms=median(arrived.ttft_ms for arrived, _ in long),
    )


@asynccontextmanager
async def run_along(
    source: Source, prompts: Sequence[Prompt], tokens: int, streams: list[Stream] | None = None
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Streams that run within the block, and have begun when it is entered.

    Args:
        source: what answers.
        prompts: of each stream one.
        tokens: of an answer; a stream that ends begins anew.
        streams: the answers are noted here.

    Yields:
        What gives the streams a moment, and raises what ended one.
    """
    noted: list[Stream] = [] if streams is None else streams
    tasks = [asyncio.create_task(_again_and_again(source, prompt, tokens, noted)) for prompt in prompts]
    try:
        while sum(bool(stream.arrivals_ns) for stream in noted) < len(prompts):
            await _alive(tasks)
        yield lambda: _alive(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _again_and_again(source: Source, prompt: Prompt, output_tokens: int, streams: list[Stream]) -> None:
    """Follow answers to one prompt until cancelled, each a stream of its own."""
    while True:
        streams.append(Stream())
        await follow(source, prompt, output_tokens, streams[-1])


async def _alive(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Give the streams a moment; raise what ended one."""
    await asyncio.sleep(0.01)
    for task in tasks:
        if task.done():
            task.result()
