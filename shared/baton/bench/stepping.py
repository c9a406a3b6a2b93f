"""An engine stepped in process, with a stopwatch on every step and on the model within it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.loader import OnProgress, load
from baton.engine.messages import Event, Failed, Output, Release, Role, SamplingParams, Submit


class StepFailed(RuntimeError):
    """The engine refused or failed a request of the benchmark."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds."""

    whole: float
    model: float
    """Inside the model's code."""

    @property
    def overhead(self) -> float:
        """Scheduling, building inputs, sampling, telling."""
        return self.whole - self.model


@dataclass(slots=True)
class _Events:
    """What the engine said since the last look."""

    seen: list[Event] = field(default_factory=list)

    def take(self, events: Sequence[Event]) -> None:
        self.seen += events
        for event in events:
            if isinstance(event, Failed):
                raise StepFailed(event.message)

    def tokens(self) -> int:
        """Tokens since the last look, which this is."""
        count = sum(len(event.token_ids) for event in self.seen if isinstance(event, Output))
        self.seen.clear()
        return count


class Stepped:
    """One engine, loaded here, without a process of its own.

    Args:
        config: of the engine.
        on_progress: follows the loading.

    Raises:
        EngineError: the model cannot be served.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress = lambda stage, fraction: None) -> None:
        torch.set_num_threads(config.threads)
        self._events = _Events()
        model = load(config, on_progress)
        self._model_seconds = 0.0
        self._entered = 0.0
        model.module.register_forward_pre_hook(self._enter)
        model.module.register_forward_hook(self._leave)
        self.engine = Engine(config, model, self._events.take)
        self._numbers = 0

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from submitting a prompt to its first token.

        Raises:
            StepFailed: the engine failed it.
        """
        self._events.tokens()
        began = time.perf_counter()
        with self._running([prompt], max_tokens=1):
            while not self._events.tokens():
                self.engine.step()
            return time.perf_counter() - began

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> list[Step]:
        """Steps in which all prompts, already computed, go on by a token each. The first such step does not count.

        Raises:
            StepFailed: the engine failed a request.
        """
        with self._running(prompts, max_tokens=steps + 3):
            self._events.tokens()
            while self._events.tokens() < len(prompts):
                self.engine.step()
            self._step()
            return [self._step() for _ in range(steps)]

    def _step(self) -> Step:
        self._model_seconds = 0.0
        began = time.perf_counter()
        self.engine.step()
        step = Step(time.perf_counter() - began, self._model_seconds)
        self._events.tokens()
        return step

    @contextmanager
    def _running(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[None]:
        """Submit prompts; release them in the end."""
        names = []
        for prompt in prompts:
            self._numbers += 1
            names.append(str(self._numbers))
            self.engine.handle(
                Submit(
                    request_id=names[-1],
                    role=Role.GENERATE,
                    token_ids=list(prompt),
                    num_prompt_tokens=len(prompt),
                    sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                )
            )
        try:
            yield
        finally:
            for name in names:
                self.engine.handle(Release(name))

    def _enter(self, *_: Any) -> None:
        self._entered = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._model_seconds += time.perf_counter() - self._entered
