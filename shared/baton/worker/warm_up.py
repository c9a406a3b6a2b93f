"""A few steps before a worker serves: they tell what its steps take."""

from __future__ import annotations

from typing import Final

from baton.engine.client import EngineClient
from baton.engine.errors import EngineError
from baton.engine.messages import Failed, Output, Role, SamplingParams, Submit
from baton.worker.step_meter import StepMeter

_SHORT: Final = 16  # tokens
_LONG_STEPS: Final = 4
_ANSWER: Final = 8
_SECONDS: Final = 3.0
_FIRST_ID: Final = 300
_SILENCE: Final = 600.0  # seconds without an event


async def warm_up(engine: EngineClient, meter: StepMeter, step_tokens: int) -> None:
    """Have the engine compute a short prompt twice, then one of four steps, if that takes a few seconds only.

    What attention costs shows in the later steps of a long prompt alone: without them, estimates of longer ones are
    chance.

    Raises:
        EngineError: a step failed.
        EngineDied: the engine is gone.
    """
    room = min(engine.max_context, engine.capacity_tokens) - _ANSWER
    if room < 1:
        return
    await _run(engine, min(_SHORT, room))
    meter.forget()
    await _run(engine, min(_SHORT, room))
    cost = meter.cost()
    short = cost.prefill(min(_SHORT, room)) if cost else 0.0
    affordable = int(_SHORT * _SECONDS / short) if short else 0
    longer = min(_LONG_STEPS * step_tokens, room, affordable)
    if longer > _SHORT:
        await _run(engine, longer)
    meter.settle()


async def _run(engine: EngineClient, tokens: int) -> None:
    """One greedy request, through to the end of its answer."""
    vocab = engine.spec.vocab_size
    ids = [min(_FIRST_ID, vocab // 2) + i % max(1, vocab // 2) for i in range(tokens)]
    submit = Submit(
        request_id="warm-up",
        role=Role.GENERATE,
        token_ids=[min(token, vocab - 1) for token in ids],
        num_prompt_tokens=tokens,
        sampling=SamplingParams(max_tokens=_ANSWER, ignore_eos=True),
        prefix_cache=False,
    )
    async with engine.request(submit) as handle:
        while True:
            event = await handle.next(_SILENCE)
            if event is None or isinstance(event, Failed):
                raise EngineError(f"the warm-up failed: {event.message if event else 'no answer'}")
            if isinstance(event, Output) and event.finish_reason is not None:
                return
