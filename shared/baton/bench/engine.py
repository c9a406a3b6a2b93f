"""The engine alone, in process: decode by batch size and prefill by length, each beside its limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from baton.bench.figures import Figure, Spread, rate
from baton.bench.linears import LinearLayers
from baton.bench.stepping import Stepped
from baton.bench.streams import draw_prompts

OnProgress = Callable[[str], None]

DECODE_WANTED: Final = 0.7
"""Share of the linear layers' own speed at batch 1."""
PREFILL_WANTED: Final = 0.6
"""Share of the matrix products' own speed at 2,048 tokens."""
BATCHING_WANTED: Final = 6.0
"""Tokens/s of batch 16 over batch 1."""
GROWTH_ALLOWED: Final = 1.5
"""Step overhead at the long context over the short one."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What is measured."""

    batches: Sequence[int] = (1, 2, 4, 8, 16)
    context: int = 256
    """Tokens of each decoding request's prompt."""
    long_context: int = 2048
    """Where the step overhead is measured again."""
    prompts: Sequence[int] = (128, 256, 512, 1024, 2048)
    steps: int = 16
    """Decode steps of one measurement."""
    rounds: int = 5
    """Repetitions, everything in turn."""


@dataclass(slots=True)
class _Seen:
    """Values by what was measured, one for each round."""

    decode: dict[int, list[float]] = field(default_factory=dict)
    decode_limit: dict[int, list[float]] = field(default_factory=dict)
    prefill: dict[int, list[float]] = field(default_factory=dict)
    prefill_limit: dict[int, list[float]] = field(default_factory=dict)
    overhead: dict[int, list[float]] = field(default_factory=dict)
    """Microseconds of a step at batch 1, by context."""
    overhead_of_batch: dict[int, list[float]] = field(default_factory=dict)
    rest: dict[int, list[float]] = field(default_factory=dict)
    """Microseconds of a decode step in the model's code but not in its linear layers, by batch size."""


def measure(stepped: Stepped, linears: LinearLayers, questions: Questions, on_progress: OnProgress) -> list[Figure]:
    """All figures, each measured so many rounds, next to its limit.

    Args:
        stepped: the engine.
        linears: the same model's linear layers.
        questions: what to measure.
        on_progress: told what is measured now.

    Raises:
        StepFailed: the engine failed a request.
    """
    seen = _Seen()
    for number in range(questions.rounds + 1):
        if number == 1:
            seen = _Seen()  # the first round warmed up
        _round(stepped, linears, questions, number, seen, on_progress)
    return [*_figures(seen, questions)]


def _round(
    stepped: Stepped, linears: LinearLayers, questions: Questions, number: int, seen: _Seen, on_progress: OnProgress
) -> None:
    vocab = stepped.engine.spec.vocab_size
    for batch in questions.batches:
        on_progress(f"round {number} of {questions.rounds}: decode, batch {batch}")
        steps = stepped.decode(draw_prompts(batch, questions.context, vocab, number), questions.steps)
        _add(seen.decode, batch, batch / median(step.whole for step in steps))
        _add(seen.overhead_of_batch, batch, 1e6 * median(step.overhead for step in steps))
        linear = linears.seconds(batch, batch)
        _add(seen.decode_limit, batch, batch / linear)
        _add(seen.rest, batch, 1e6 * (median(step.model for step in steps) - linear))
    for tokens in questions.prompts:
        on_progress(f"round {number} of {questions.rounds}: prefill, {tokens} tokens")
        _add(seen.prefill, tokens, tokens / stepped.prefill(draw_prompts(1, tokens, vocab, number)[0]))
        _add(seen.prefill_limit, tokens, tokens / linears.seconds(tokens, 1))
    for context in (questions.context, questions.long_context):
        on_progress(f"round {number} of {questions.rounds}: step overhead at {context} tokens")
        steps = stepped.decode(draw_prompts(1, context, vocab, number), questions.steps)
        _add(seen.overhead, context, 1e6 * median(step.overhead for step in steps))


def _figures(seen: _Seen, questions: Questions) -> list[Figure]:
    figures = []
    for batch in questions.batches:
        name = f"decode, batch {batch}, after {questions.context} tokens"
        wanted = DECODE_WANTED if batch == 1 else None
        figures.append(
            rate(name, seen.decode[batch], "tokens/s", seen.decode_limit[batch], "linear layers only", wanted)
        )
    if {1, 16} <= set(questions.batches):
        ratios = [b / a for a, b in zip(seen.decode[1], seen.decode[16], strict=True)]
        figures.append(rate("batch 16 over batch 1", ratios, "x", [BATCHING_WANTED] * len(ratios), "wanted", 1.0))
    for tokens in questions.prompts:
        wanted = PREFILL_WANTED if tokens >= 2048 else None
        name, limit = f"prefill, {tokens:,} tokens", "matrix products only"
        figures.append(rate(name, seen.prefill[tokens], "tokens/s", seen.prefill_limit[tokens], limit, wanted))
    for batch in questions.batches:
        name = f"model besides its linear layers, batch {batch}"
        figures.append(Figure(name, Spread.of(seen.rest[batch]), "µs"))
    for batch in questions.batches:
        figures.append(Figure(f"step overhead, batch {batch}", Spread.of(seen.overhead_of_batch[batch]), "µs"))
    short, long = seen.overhead[questions.context], seen.overhead[questions.long_context]
    figures.append(Figure(f"step overhead after {questions.long_context:,} tokens", Spread.of(long), "µs"))
    growth = [late / early for early, late in zip(short, long, strict=True)]
    shares = Spread.of(GROWTH_ALLOWED / value for value in growth)
    name = f"the same over that after {questions.context}"
    figures.append(Figure(name, Spread.of(growth), "x", Spread.of([GROWTH_ALLOWED]), "allowed", shares, wanted=1.0))
    return figures


def _add(values: dict[int, list[float]], key: int, value: float) -> None:
    values.setdefault(key, []).append(value)
