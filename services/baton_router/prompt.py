"""Prompts to token ids. Long ones are tokenized in a thread, so that no other stream waits for them."""

from __future__ import annotations

import asyncio

from baton.rpc.errors import InvalidArgument
from baton.text.model import RenderedPrompt, TextModel
from baton.text.template import TemplateError
from baton_router.validate import Limits, Prompt, Turn

_INLINE_BYTES = 8 * 1024  # about a millisecond of tokenizing


async def tokenize(prompt: Prompt, model: TextModel, field: str, limits: Limits) -> RenderedPrompt:
    """Ids of a checked prompt, and the text they stand for (empty for a prompt of ids).

    Raises:
        InvalidArgument: the prompt cannot fit into the context, or the chat template refused it.
    """
    if isinstance(prompt, str):
        return await _encode(prompt, model, field, limits)
    if prompt and isinstance(prompt[0], Turn):
        return await _render([turn for turn in prompt if isinstance(turn, Turn)], model, field, limits)
    return RenderedPrompt("", [token_id for token_id in prompt if isinstance(token_id, int)])


async def _encode(text: str, model: TextModel, field: str, limits: Limits) -> RenderedPrompt:
    size = len(text.encode())
    _check_fits(size, model, field, limits)
    if size <= _INLINE_BYTES:
        return RenderedPrompt(text, model.tokenizer.encode(text))
    return RenderedPrompt(text, await asyncio.to_thread(model.tokenizer.encode, text))


async def _render(turns: list[Turn], model: TextModel, field: str, limits: Limits) -> RenderedPrompt:
    messages = [(turn.role, turn.text) for turn in turns]
    size = sum(len(text.encode()) for _, text in messages)
    # A template may leave old turns out, so only the last one must be in the prompt, and not even all of it: no bound
    # on tokens can be given here. max_prompt_bytes was checked.
    try:
        if size <= _INLINE_BYTES:
            return model.render(messages)
        return await asyncio.to_thread(model.render, messages)
    except TemplateError as error:
        raise InvalidArgument(field, str(error)) from error


def _check_fits(size: int, model: TextModel, field: str, limits: Limits) -> None:
    """Refuse at once what no tokenizing can make fit."""
    at_least = model.tokenizer.fewest_tokens(size)
    if at_least >= limits.max_context:
        raise InvalidArgument(field, f"has at least {at_least} tokens; the model's context is {limits.max_context}")
