"""Which graph serves a step, what its buffers hold, and that no graph is trusted untested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.cuda.graphs import Forward, Graph, Graphs, capture_sizes
from baton.engine.cuda.inputs import PLACEHOLDER, Inputs
from baton.engine.cuda.pages import TRASH, Pages
from baton.engine.errors import UnsupportedModel
from baton.engine.loader import LoadedModel
from baton.engine.messages import Role, SamplingParams
from baton.engine.request import Request
from baton.engine.scheduler import Work
from tests.engine.conftest import Stepped, a_prompt, a_submit
from tests.engine.cuda.conftest import Paged, rerun

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
        (320, [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), 256, 288, 320]),
    ],
)
def test_sizes(limit: int, sizes: list[int]) -> None:
    assert capture_sizes(limit) == sizes


def test_no_sizes() -> None:
    with pytest.raises(ValueError, match="at most 0"):
        capture_sizes(0)


@given(st.integers(1, 700), st.data())
def test_every_batch_has_a_graph_that_is_not_much_larger(limit: int, data: st.DataObject) -> None:
    graphs = Graphs(Graph(size, None, lambda: None, torch.zeros(0)) for size in capture_sizes(limit))  # type: ignore[arg-type]
    rows = data.draw(st.integers(1, limit))
    graph = graphs.of(rows)
    assert graph is not None
    assert rows <= graph.size <= max(rows + 31, rows)
    assert all(size < rows for size in graphs.sizes if size < graph.size)
    assert graphs.of(limit + 1) is None


def test_the_largest_is_captured_first() -> None:
    captured: list[int] = []

    def forward(size: int, inputs: object) -> torch.Tensor:
        captured.append(size)
        return torch.full((size,), float(size))

    def capture(function: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        return (lambda: captured.append(-int(function()[0]))), function()

    graphs = Graphs.build([1, 2, 8], lambda size: None, forward, capture)  # type: ignore[arg-type, return-value]
    assert captured == [8, 2, 1]
    assert graphs.sizes == [1, 2, 8]
    graph = graphs.of(2)
    assert graph is not None
    graph.replay()
    assert captured[-1] == -2, "each graph runs its own forward"


# -------------------------------------------------------------------------------------------- inputs


def a_work(slot: int, tokens: list[int], start: int, count: int, sequence: int = 0) -> Work:
    request = Request.probe(tokens, Role.GENERATE, SamplingParams(max_tokens=9))
    request.slot, request.sequence = slot, sequence
    return Work(request, start, count)


def test_rows_of_nobody_go_to_the_trash() -> None:
    pages = Pages(9, 4, 3, 16)
    for slot in range(3):
        pages.prepare(slot, 0, 9)
    inputs = Inputs(8, 8, pages, CPU, pinned=False)
    for _ in range(2):  # fuller steps before, in both of the host's buffers
        inputs.fill([a_work(i, [50 + i] * 9, 8, 1) for i in range(3)], {}, pad_to=8)
    inputs.fill([a_work(1, [7] * 6, 5, 1)], {}, pad_to=4)
    rows = inputs.rows(4, 4)
    assert rows.places.tolist() == [pages.tables[1, 1] * 4 + 1, TRASH, TRASH, TRASH]
    assert rows.lengths.tolist() == [6, 1, 1, 1]
    assert rows.tables.tolist() == [pages.tables[1].tolist(), *[[TRASH] * 4] * 3]
    assert rows.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert rows.key_starts.tolist() == [0, 6, 7, 8, 9]
    assert inputs.ids(4, torch.tensor([99])).tolist() == [[7, 0, 0, 0]]
    assert inputs.positions(4).tolist() == [[5, 0, 0, 0]]


def test_chunks_and_single_tokens_are_packed() -> None:
    pages = Pages(9, 4, 3, 16)
    for slot in range(3):
        pages.prepare(slot, 0, 9)
    inputs = Inputs(16, 3, pages, CPU, pinned=False)
    works = [
        a_work(2, list(range(9)), 8, 1),
        a_work(0, list(range(20, 29)), 2, 4),
        a_work(1, list(range(40, 46)), 3, 3),
    ]
    spans = inputs.fill(works, {})
    rows = inputs.rows(8, 3, spans)
    assert inputs.ids(8, torch.zeros(1, dtype=torch.long)).tolist() == [[8, 22, 23, 24, 25, 43, 44, 45]]
    assert inputs.positions(8).tolist() == [[8, 2, 3, 4, 5, 3, 4, 5]]
    assert rows.lengths.tolist() == [9, 6, 6]
    assert rows.query_starts.tolist() == [0, 1, 5, 8]
    assert rows.key_starts.tolist() == [0, 9, 15, 21]
    assert (rows.longest_query, rows.longest_key) == (4, 9)
    assert rows.tables.shape == (3, 3), "no wider than the longest needs"
    assert inputs.sampled(2).tolist() == [0, 7], "the chunk in the middle of its prompt gives no token"


def test_tokens_not_read_yet_come_from_the_step_before() -> None:
    pages = Pages(9, 4, 3, 16)
    for slot in range(3):
        pages.prepare(slot, 0, 4)
    inputs = Inputs(3, 3, pages, CPU, pinned=False)
    works = [
        a_work(0, [1, 2, PLACEHOLDER], 2, 1, sequence=7),
        a_work(1, [1, 2, 3], 2, 1, sequence=8),
        a_work(2, [1, PLACEHOLDER], 1, 1, sequence=9),
    ]
    inputs.fill(works, {9: 0, 8: 1, 7: 2})
    assert inputs.ids(3, torch.tensor([70, 80, 90])).tolist() == [[90, 3, 70]]
    assert inputs.ids(3, torch.tensor([-1, 80, 90])).tolist() == [[90, 3, 0]], "unsettled: any token will do"


# ----------------------------------------------------------------------------------------- self-test


def test_every_size_is_tested_before_anybody_is_served(loaded: LoadedModel) -> None:
    replays: list[int] = []

    def capture(forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        replay, logits = rerun(forward)
        return (lambda: (replays.append(len(logits)), replay())[0]), logits  # type: ignore[func-returns-value]

    paged = Paged(loaded, capture=capture, num_slots=10)
    assert paged.engine.runner.graphs.sizes == [1, 2, 4, 8, 10]
    assert set(replays) == {1, 2, 4, 8, 10}
    paged.check_pages()


@pytest.mark.parametrize("wrong", [1, 2, 4, 8])
def test_a_wrong_graph_is_found_out(loaded: LoadedModel, wrong: int) -> None:
    def capture(forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        replay, logits = rerun(forward)
        if len(logits) == wrong:
            return (lambda: None), logits  # keeps what it computed when it was captured
        return replay, logits

    with pytest.raises(UnsupportedModel, match=f"decode step of {wrong}" if wrong > 1 else "tokens 22 to 23"):
        Paged(loaded, capture=capture)


def test_a_model_that_cannot_be_captured_runs_without(loaded: LoadedModel) -> None:
    def capture(forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    paged = Paged(loaded, capture=capture)
    assert paged.engine.runner.graphs.sizes == []
    submit = a_submit("r", a_prompt(20), max_tokens=8)
    assert paged.run(submit).tokens("r") == Stepped(loaded).run(submit).tokens("r")
