"""What a token costs each process it passes on its way to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.bench.processor_time import processor_ns
from baton.bench.streams import Prompt, Source, Stream, follow


@dataclass(frozen=True, slots=True)
class HopCost:
    """Streams that ran at once."""

    microseconds: dict[str, float]
    """Of processor time per token, of each process."""
    tokens_per_message: float
    """As the client saw them."""
    interval: float
    """Seconds between two tokens of a stream, on average."""


async def hop_cost(
    source: Source, processes: Mapping[str, int], prompts: Sequence[Prompt], output_tokens: int
) -> HopCost:
    """Ask all prompts at once. What the calls themselves cost is counted too: long answers make little of it.

    Args:
        source: what answers.
        processes: ids of those that are looked at, by name.
        prompts: one for each stream.
        output_tokens: of each answer.
    """
    before = {name: processor_ns(pid) for name, pid in processes.items()}
    streams = await asyncio.gather(*(follow(source, prompt, output_tokens, Stream()) for prompt in prompts))
    tokens = sum(stream.tokens for stream in streams)
    spent = {name: processor_ns(pid) - before[name] for name, pid in processes.items()}
    lasted = sum(stream.arrivals_ns[-1] - stream.arrivals_ns[0] for stream in streams) / 1e9
    return HopCost(
        microseconds={name: nanoseconds / 1e3 / tokens for name, nanoseconds in spent.items()},
        tokens_per_message=tokens / sum(len(stream.arrivals_ns) for stream in streams),
        interval=lasted / max(1, tokens - len(streams)),
    )
