"""Engines in this process, stepped by hand, over small random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import torch

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.layout import KvDtype
from baton.engine.loader import LoadedModel, load
from baton.engine.messages import (
    Command,
    Event,
    Failed,
    FinishReason,
    KvReady,
    Output,
    Reserved,
    Role,
    SamplingParams,
    StepReport,
    Submit,
)
from tests.fixtures.models import random_llama

EVENT_OF_A_REQUEST = (Reserved, KvReady, Output, Failed)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def loaded(llama: Path) -> LoadedModel:
    return load(EngineConfig(model=llama))


@pytest.fixture(scope="session")
def loaded_bfloat16(llama: Path) -> LoadedModel:
    return load(EngineConfig(model=llama, dtype=KvDtype.BFLOAT16))


def a_prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    return torch.randint(5, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def a_submit(
    request_id: str,
    prompt: Sequence[int],
    role: Role = Role.GENERATE,
    *,
    max_tokens: int = 16,
    generated: Sequence[int] = (),
    start_token: int = 0,
    priority: int = 0,
    ignore_eos: bool = True,
    **sampling: object,
) -> Submit:
    """A request; `generated` are the tokens of an earlier attempt."""
    return Submit(
        request_id=request_id,
        role=role,
        token_ids=[*prompt, *generated],
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling),  # type: ignore[arg-type]
        start_token=start_token,
        priority=priority,
    )


class Stepped:
    """An engine in this process and all it said.

    Args:
        model: loaded.
        clock: nanoseconds.
        config: entries of EngineConfig.
    """

    def __init__(self, model: LoadedModel, clock: Callable[[], int] | None = None, **config: object) -> None:
        self.events: list[Event] = []
        settings = replace(
            EngineConfig(model=Path(), dtype=model.spec.dtype, num_slots=8, slot_tokens=256, step_tokens=64),
            **config,  # type: ignore[arg-type]
        )
        clocks = {} if clock is None else {"clock": clock}
        self.engine = Engine(settings, model, self.events.extend, **clocks)

    def expecting_short_answers(self) -> Self:
        """Those before were short: more is let in than there will be memory for."""
        for _ in range(20):
            self.engine.scheduler.lengths.ended(1)
        return self

    def handle(self, *commands: Command) -> None:
        for command in commands:
            self.engine.handle(command)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.engine.has_work
            self.engine.step()

    def run(self, *commands: Command, steps: int = 2000) -> Stepped:
        """Step until there is nothing to do."""
        self.handle(*commands)
        for _ in range(steps):
            if not self.engine.has_work:
                return self
            self.engine.step()
        raise AssertionError(f"still busy after {steps} steps")

    def until(self, condition: Callable[[], bool], steps: int = 2000) -> None:
        """Step until something is so."""
        for _ in range(steps):
            if condition():
                return
            self.step()
        raise AssertionError(f"not so after {steps} steps")

    def of(self, request_id: str) -> list[Event]:
        """What was said about one request."""
        return [e for e in self.events if isinstance(e, EVENT_OF_A_REQUEST) and e.request_id == request_id]

    def outputs(self, request_id: str) -> list[Output]:
        return [e for e in self.of(request_id) if isinstance(e, Output)]

    def tokens(self, request_id: str) -> list[int]:
        """Its tokens so far; their indices must be continuous."""
        tokens: list[int] = []
        outputs = self.outputs(request_id)
        for output in outputs:
            assert output.index == outputs[0].index + len(tokens)
            tokens += output.token_ids
        return tokens

    def finish_reason(self, request_id: str) -> FinishReason | None:
        outputs = self.outputs(request_id)
        assert all(output.finish_reason is None for output in outputs[:-1])
        return outputs[-1].finish_reason if outputs else None

    def failure(self, request_id: str) -> Failed:
        (event,) = [e for e in self.of(request_id) if isinstance(e, Failed)]
        return event

    def slot(self, request_id: str) -> int:
        """The slot that a RECEIVE or PREFILL request got."""
        return next(e.slot for e in self.of(request_id) if isinstance(e, (Reserved, KvReady)))

    @property
    def preempted(self) -> int:
        return sum(e.preempted for e in self.events if isinstance(e, StepReport))

    def kv(self, slot: int, start: int, stop: int) -> list[bytes]:
        """Bytes of all layers' keys and values of tokens [start, stop)."""
        buffer, layout = memoryview(self.engine.pool.memory), self.engine.layout
        return [
            bytes(part) for layer in range(len(layout.layers)) for part in layout.rows(buffer, layer, slot, start, stop)
        ]

    def write_kv(self, slot: int, start: int, parts: list[bytes]) -> None:
        """As a front writes what it received."""
        buffer, layout = memoryview(self.engine.pool.memory), self.engine.layout
        waiting = iter(parts)
        for layer in range(len(layout.layers)):
            for which in range(2):
                part = next(waiting)
                stop = start + len(part) // layout.token_bytes(layer)[which]
                layout.rows(buffer, layer, slot, start, stop)[which][:] = part

    def check_empty(self) -> None:
        """Nothing is held any more."""
        state = self.engine.debug_state()
        assert state.requests == []
        assert (state.free_slots, state.used_tokens) == (state.total_slots, 0)
        assert not self.engine.has_work
