"""An engine of our own as a source of streams: in a process of its own, as the services run it, with no network."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from typing import Final

from baton.engine.client import EngineClient
from baton.engine.messages import Failed, Output, Role, SamplingParams, Submit

_SILENCE: Final = 60.0
"""Seconds without an event after which a request is given up."""


class EngineSource:
    """Answers prompts with one engine that prefills and decodes.

    Args:
        engine: running; the caller closes it.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        """See `Source`.

        Raises:
            RuntimeError: the engine refused or failed, or said nothing for a minute.
        """
        submit = Submit(
            request_id=str(next(self._numbers)),
            role=Role.GENERATE,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        )
        async with self._engine.request(submit) as handle:
            while True:
                match await handle.next(_SILENCE):
                    case Output(token_ids=tokens, finish_reason=reason):
                        if tokens:
                            yield len(tokens)
                        if reason is not None:
                            return
                    case Failed(message=message):
                        raise RuntimeError(message)
                    case None:
                        raise RuntimeError(f"the engine said nothing for {_SILENCE:g} s")
                    case _:
                        pass  # a chunk of the prompt
