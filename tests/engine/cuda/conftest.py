"""The device's engine on CPU tensors: everything but the device itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from baton.engine.config import EngineConfig
from baton.engine.cuda.engine import DeviceEngine
from baton.engine.cuda.graphs import Capture, Forward
from baton.engine.cuda.sdpa import GatheredAttention
from baton.engine.loader import LoadedModel
from tests.engine.conftest import Stepped


def rerun(forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
    """In place of a graph: the forward again, into the same tensor."""
    logits = forward().clone()

    def replay() -> None:
        logits.copy_(forward())

    return replay, logits


class Paged(Stepped):
    """An engine over pages in this process and all it said.

    Args:
        model: loaded, on any device.
        page_size: tokens of a page.
        capture: of decode steps; None: every step is launched piece by piece.
        clock: nanoseconds.
        config: entries of EngineConfig.
    """

    engine: DeviceEngine

    def __init__(
        self,
        model: LoadedModel,
        page_size: int = 16,
        capture: Capture | None = rerun,
        clock: Callable[[], int] = time.monotonic_ns,
        **config: object,
    ) -> None:
        self.events = []
        settings = replace(
            EngineConfig(model=Path(), dtype=model.spec.dtype, num_slots=8, slot_tokens=256, step_tokens=64),
            **config,  # type: ignore[arg-type]
        )
        self.engine = DeviceEngine(
            settings, model, self.events.extend, attention=GatheredAttention(page_size), capture=capture, clock=clock
        )

    def check_pages(self) -> None:
        """Nothing is held any more; pages only by free slots that keep a prefix, and each is counted."""
        self.check_empty()
        check_all_back(self.engine)


def check_all_back(engine: DeviceEngine) -> None:
    """No page is lost."""
    pages, slots = engine.pool.pages, range(engine.layout.num_slots)
    kept = getattr(engine.debug_state(), "kept_slots", 0)  # none, where there is no prefix cache
    assert sum(pages.held(slot) > 0 for slot in slots) == kept
    held = {int(page) for slot in slots for page in pages.tables[slot, : pages.held(slot)]}
    assert pages.free == engine.pool.key_pages[0].shape[0] - 1 - len(held)
