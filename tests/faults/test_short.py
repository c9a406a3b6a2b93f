"""The fault suite in short: correctness under every fault that two cores can afford in a minute, on one shared mesh.

It judges what no speed excuses: nothing lost, no wrong token, nothing leaked, honest statuses. How fast things are
noticed and freed is measured by scripts/faults.py, on a machine with nothing else to do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.bed import Bed, running_bed
from tests.faults.history import Question
from tests.faults.questions import questions
from tests.faults.scenario import Scenario, perform
from tests.faults.short import LENGTHS, SHORT, TOPOLOGY

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def book(fault_model: Path) -> tuple[Question, ...]:
    return questions(fault_model, 40, LENGTHS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bed(fault_model: Path) -> AsyncIterator[Bed]:
    async with running_bed(fault_model, TOPOLOGY) as running:
        yield running


@pytest.mark.parametrize("scenario", SHORT, ids=[f"{s.row} {s.title}" for s in SHORT])
async def test_row(bed: Bed, book: tuple[Question, ...], scenario: Scenario) -> None:
    result = await perform(scenario, bed, book)
    print(result.codes, result.happened, result.figures)  # shown if it fails
    assert not result.violations, "\n".join(str(violation) for violation in result.violations[:20])
    assert all(figure.met for figure in result.figures), result.figures
