"""One step ahead or not: the tokens are those of the engine on the CPU, and everything taken comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.cuda.sampling import UNSETTLED, SamplingInputs
from baton.engine.loader import LoadedModel
from baton.engine.messages import Commit, ComputeHere, FinishReason, KvReady, Output, Release, Role, StepReport, Submit
from baton.engine.sampler import SampleRow
from tests.engine.conftest import Stepped, a_prompt, a_submit
from tests.engine.cuda.conftest import Paged

LENGTHS = (1, 5, 17, 33, 40, 64, 65, 100)
SAMPLINGS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.3},
]


def batch(kinds: int = 3) -> list[Submit]:
    """Greedy and sampled side by side; with 4 kinds, rows for the host among them, so that nothing runs ahead."""
    return [
        a_submit(f"r{i}", a_prompt(length, i), max_tokens=24 + i % 2, seed=1000 + i, **SAMPLINGS[i % kinds])
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> list[list[int]]:
    return answers(Stepped(loaded).run(*batch()))


def answers(stepped: Stepped) -> list[list[int]]:
    return [stepped.tokens(f"r{i}") for i in range(8)]


@pytest.mark.parametrize("page_size", [4, 16, 256])
@pytest.mark.parametrize("step_tokens", [9, 64, 512])
def test_tokens_of_the_cpu_engine(
    loaded: LoadedModel, expected: list[list[int]], page_size: int, step_tokens: int
) -> None:
    paged = Paged(loaded, page_size, step_tokens=step_tokens).run(*batch())
    assert answers(paged) == expected
    paged.check_pages()


def test_tokens_of_the_cpu_engine_with_rows_for_the_host(loaded: LoadedModel) -> None:
    assert answers(Paged(loaded).run(*batch(4))) == answers(Stepped(loaded).run(*batch(4)))


def test_tokens_of_the_cpu_engine_without_graphs(loaded: LoadedModel, expected: list[list[int]]) -> None:
    paged = Paged(loaded, capture=None).run(*batch())
    assert paged.engine.runner.graphs.sizes == []
    assert answers(paged) == expected
    paged.check_pages()


@pytest.mark.parametrize("block_tokens", [1, 4])
def test_same_tokens_after_preemptions(loaded: LoadedModel, expected: list[list[int]], block_tokens: int) -> None:
    paged = Paged(loaded, capacity_tokens=128, block_tokens=block_tokens, step_tokens=48)
    paged.expecting_short_answers().run(*batch())
    assert paged.preempted >= 3
    assert answers(paged) == expected
    paged.check_pages()


def test_steps_are_launched_before_the_ones_before_are_read(loaded: LoadedModel) -> None:
    """Or all of the above would show nothing."""
    paged = Paged(loaded)
    paged.handle(a_submit("r", a_prompt(20), max_tokens=8))
    paged.step()
    assert paged.engine.in_flight
    assert paged.tokens("r") == []
    paged.step()
    assert len(paged.tokens("r")) == 1
    paged.run()
    assert len(paged.tokens("r")) == 8
    steps = [e for e in paged.events if isinstance(e, StepReport) and e.decode_requests]
    assert len(steps) == 7, "the end by length is known beforehand: no row is wasted on it"


def test_a_row_the_host_must_sample_is_read_at_once(loaded: LoadedModel) -> None:
    paged = Paged(loaded)
    paged.handle(a_submit("r", a_prompt(20), max_tokens=8, presence_penalty=0.5))
    paged.step()
    assert not paged.engine.in_flight
    assert len(paged.tokens("r")) == 1


def test_a_request_that_ended_wastes_a_row_and_nothing_else(loaded: LoadedModel) -> None:
    prompt, other = a_prompt(20), a_submit("other", a_prompt(30, 5), max_tokens=20)
    free = Paged(loaded).run(a_submit("r", prompt, max_tokens=10)).tokens("r")
    stop = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    wanted = free[: free.index(stop) + 1]
    paged = Paged(loaded).run(a_submit("r", prompt, max_tokens=10, stop_token_ids=(stop,)), other)
    assert paged.tokens("r") == wanted
    assert paged.finish_reason("r") is FinishReason.STOP
    assert paged.tokens("other") == Stepped(loaded).run(other).tokens("other")
    paged.check_pages()


class Undecided(SamplingInputs):
    """Leaves every third row to the host, as if its draw had been too close."""

    count = 0

    def sample(self, logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:  # type: ignore[override]
        tokens = super().sample(logits, rows)
        for i in range(len(rows)):
            Undecided.count += 1
            if Undecided.count % 3 == 0:
                tokens[i] = UNSETTLED
        return tokens


def test_unsettled_rows_void_the_row_after_them(loaded: LoadedModel, expected: list[list[int]]) -> None:
    paged = Paged(loaded)
    paged.engine.runner._sampling = Undecided(8, torch.device("cpu"), pinned=False)
    paged.handle(*batch())
    void = 0
    while paged.engine.has_work:
        paged.engine.step()
        ahead = paged.engine._ahead
        void += len(ahead.void) if ahead is not None else 0
    assert void > 20, "no row under way was void: this test shows nothing"
    assert answers(paged) == expected
    assert [paged.finish_reason(f"r{i}") for i in range(8)] == [FinishReason.LENGTH] * 8
    paged.check_pages()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tokens_do_not_depend_on_what_comes_and_goes(
    loaded: LoadedModel, expected: list[list[int]], data: st.DataObject
) -> None:
    """Requests are submitted and released at any moment, in a pool too small for all."""
    paged = Paged(
        loaded,
        page_size=data.draw(st.sampled_from([4, 16])),
        num_slots=4,
        capacity_tokens=200,
        step_tokens=data.draw(st.sampled_from([9, 40])),
    )
    waiting = batch()
    released: set[str] = set()
    others = 0
    for _ in range(40):
        action = data.draw(st.sampled_from(["step", "step", "submit", "other", "release"]))
        if action == "submit" and waiting:
            paged.handle(waiting.pop())
        elif action == "other":
            others += 1
            paged.handle(a_submit(f"other{others}", a_prompt(20 + others, others), max_tokens=6, priority=others % 3))
        elif action == "release" and others:
            name = f"other{data.draw(st.integers(1, others))}"
            released.add(name)
            paged.handle(Release(name))
        elif paged.engine.has_work:
            paged.engine.step()
    paged.run(*waiting)
    assert answers(paged) == expected
    for i in range(1, others + 1):
        if f"other{i}" not in released:
            assert len(paged.tokens(f"other{i}")) == 6
    paged.check_pages()


def test_a_failed_launch_fails_its_requests_only(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged(loaded)
    paged.handle(a_submit("r", a_prompt(20), max_tokens=8))
    paged.step(3)
    launch = paged.engine.runner.launch

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(paged.engine.runner, "launch", broken)
    paged.step()
    assert "out of memory" in paged.failure("r").message
    assert len(paged.tokens("r")) == 3, "what was under way is not lost"
    monkeypatch.setattr(paged.engine.runner, "launch", launch)
    assert paged.run(a_submit("r2", a_prompt(20), max_tokens=8)).tokens("r2")[:3] == paged.tokens("r")
    paged.check_pages()


def test_nan_fails_its_own_request_only(loaded: LoadedModel) -> None:
    prompts = [a_prompt(20, i) for i in range(2)]
    wanted = [Stepped(loaded).run(a_submit("r", p, max_tokens=9)).tokens("r") for p in prompts]
    paged = Paged(loaded)
    paged.handle(*(a_submit(f"r{i}", p, max_tokens=9) for i, p in enumerate(prompts)))
    paged.step(3)
    pool = paged.engine.pool
    request = paged.engine._requests["r0"]
    pool.value_pages[0][int(pool.pages.tables[request.slot, 0]), 3] = torch.nan
    paged.run()
    assert "row" in paged.failure("r0").message
    assert paged.tokens("r1") == wanted[1]
    # Whoever gets the pages next does not read what is left of it.
    for i, prompt in enumerate(prompts):
        assert paged.run(a_submit(f"again{i}", prompt, max_tokens=9)).tokens(f"again{i}") == wanted[i]
    paged.check_pages()


# ------------------------------------------------------------------------------------------- handoff


@pytest.mark.parametrize("start_token", [0, 19])
def test_kv_for_others_lies_in_the_file(loaded: LoadedModel, start_token: int) -> None:
    """Byte by byte what the CPU engine would have put there, up to rounding, and told once it is there."""
    prompt = a_prompt(50)
    paged, stepped = Paged(loaded, step_tokens=16), Stepped(loaded, step_tokens=16)
    for engine in (paged, stepped):
        engine.run(a_submit("r", prompt, Role.PREFILL, start_token=start_token, temperature=0.8, seed=3))
    assert paged.tokens("r") == stepped.tokens("r")
    ranges = [
        [(e.layer, e.start, e.stop) for e in engine.of("r") if isinstance(e, KvReady)] for engine in (paged, stepped)
    ]
    assert sorted(ranges[0]) == sorted(ranges[1])
    assert isinstance(paged.of("r")[-1], Output), "the first token comes last"
    for ours, theirs in zip(paged.engine.pool.keys, stepped.engine.pool.keys, strict=True):
        got, want = ours[paged.slot("r"), start_token:50], theirs[stepped.slot("r"), start_token:50]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not ours[paged.slot("r"), :start_token].any(), "what nobody asked for stays where it is"
    paged.run(Release("r"))
    paged.check_pages()


@pytest.mark.parametrize("mode", SAMPLINGS[:2] + SAMPLINGS[3:], ids=str)
def test_received_kv_is_decoded(loaded: LoadedModel, mode: dict[str, object]) -> None:
    """Prefilled in one engine, decoded in another, from bytes alone."""
    prompt = a_prompt(50)
    submit = a_submit("r", prompt, Role.PREFILL, max_tokens=20, seed=7, **mode)
    wanted = Stepped(loaded).run(a_submit("r", prompt, max_tokens=20, seed=7, **mode)).tokens("r")
    prefill, decode = Paged(loaded, page_size=4), Paged(loaded, page_size=16)
    first = prefill.run(submit).tokens("r")
    decode.handle(a_submit("other", a_prompt(40, 3)), replace_role(submit, Role.RECEIVE))
    decode.step(2)
    slot = decode.slot("r")
    decode.write_kv(slot, 0, prefill.kv(prefill.slot("r"), 0, 50))
    decode.run(Commit("r", first))
    assert first + decode.tokens("r") == wanted
    decode.check_pages()


def replace_role(submit: Submit, role: Role) -> Submit:
    return Submit(
        request_id=submit.request_id,
        role=role,
        token_ids=submit.token_ids,
        num_prompt_tokens=submit.num_prompt_tokens,
        sampling=submit.sampling,
    )


def test_a_lost_handoff_is_computed_here(loaded: LoadedModel) -> None:
    prompt = a_prompt(50)
    wanted = Stepped(loaded).run(a_submit("r", prompt, max_tokens=9)).tokens("r")
    paged = Paged(loaded)
    paged.handle(a_submit("r", prompt, Role.RECEIVE, max_tokens=9))
    paged.step()
    paged.run(ComputeHere("r", wanted[:2]))
    assert wanted[:2] + paged.tokens("r") == wanted
    paged.check_pages()


def test_impossible_commits_are_refused(loaded: LoadedModel) -> None:
    paged = Paged(loaded)
    paged.handle(a_submit("r", a_prompt(50), Role.RECEIVE, max_tokens=9))
    paged.step()
    paged.handle(Commit("r", [1] * 1000))
    assert "more tokens" in paged.failure("r").message
    paged.check_pages()


def test_every_nanosecond_is_queue_or_compute(loaded: LoadedModel) -> None:
    """Steps overlap; what is booked does not."""
    now = 0
    paged = Paged(loaded, clock=lambda: now, num_slots=2, step_tokens=16)
    arrivals, seen = {}, 0
    for i in range(40):
        if i % 6 == 0 and i < 30:
            arrivals[f"r{i}"] = now
            paged.handle(a_submit(f"r{i}", a_prompt(5 + 3 * i, i), max_tokens=4))
        now += 100
        if paged.engine.has_work:
            paged.engine.step()
        now += 7
        for event in paged.events[seen:]:
            if isinstance(event, Output):
                assert event.queue_ns + event.compute_ns == now - 7 - arrivals[event.request_id]
                assert event.compute_ns > 0
        seen = len(paged.events)
    assert [len(paged.tokens(name)) for name in arrivals] == [4] * 5
    busy = sum(paged.outputs(name)[-1].compute_ns for name in arrivals)
    assert busy <= 2 * now, "two slots cannot be computed for longer than the time there was, twice"


class Late:
    """An event that is over when somebody says so."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def test_kv_is_told_when_it_has_arrived_and_not_before(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged(loaded, step_tokens=16)
    download, events = paged.engine.pool.download, []

    def slow(*args: int) -> Late:
        download(*args)
        events.append(Late())
        return events[-1]

    monkeypatch.setattr(paged.engine.pool, "download", slow)
    paged.handle(a_submit("r", a_prompt(40), Role.PREFILL))
    paged.step()
    assert len(events) == 2
    assert paged.of("r") == []
    events[0].over = True
    flight = paged.engine._ahead
    assert flight is not None
    flight.flight.departures.tell()
    assert [e.layer for e in paged.of("r") if isinstance(e, KvReady)] == [0]
    paged.handle(Release("r"))
    paged.run()
    assert [e.layer for e in paged.of("r") if isinstance(e, KvReady)] == [0], "nobody waits for the second any more"
    paged.check_pages()


def test_what_others_computed_before_comes_down_before_it_is_told(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix from a cache is on the device only; whoever says that it lies in the slot makes it so."""
    paged = Paged(loaded)
    paged.handle(a_submit("r", a_prompt(40), max_tokens=9))
    paged.step(3)
    pool, slot = paged.engine.pool, paged.engine._requests["r"].slot
    assert not pool.keys[0][slot].any()
    download, events = pool.download, []

    def slow(*args: int) -> Late:
        download(*args)
        events.append(Late())
        return events[-1]

    monkeypatch.setattr(pool, "download", slow)
    paged.engine._emit([KvReady("r", slot, layer, 3, 37) for layer in range(2)])
    assert [event.over for event in events] == [True, True]
    assert [e.layer for e in paged.of("r") if isinstance(e, KvReady)] == [0, 1]
    places = torch.from_numpy(pool.pages.places(slot, 3, 37)).long()
    for side, pages in ((pool.keys, pool.key_pages), (pool.values, pool.value_pages)):
        for layer in range(2):
            assert torch.equal(side[layer][slot, 3:37], pages[layer].flatten(0, 1)[places])
            assert not side[layer][slot, :3].any()
            assert not side[layer][slot, 37:].any()
