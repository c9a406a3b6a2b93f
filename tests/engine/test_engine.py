"""An engine's answers do not depend on what runs beside them, and everything it takes it gives back."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from baton.engine.config import EngineConfig
from baton.engine.loader import LoadedModel, load
from baton.engine.messages import (
    Commit,
    ComputeHere,
    DebugState,
    Failed,
    FailureReason,
    FinishReason,
    Inspect,
    KvReady,
    Output,
    Release,
    Reserved,
    Role,
    StepReport,
    Stop,
    Submit,
)
from baton.engine.sampler import SampleRow, sample
from tests import model_zoo
from tests.engine.conftest import Stepped, a_prompt, a_submit

MODES = pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95}], ids=str)
LENGTHS = (1, 5, 17, 33, 40, 64, 65, 100)


def batch(sampling: dict[str, object], max_tokens: int = 24) -> list[Submit]:
    return [
        a_submit(f"r{i}", a_prompt(length, i), max_tokens=max_tokens, seed=1000 + i, **sampling)
        for i, length in enumerate(LENGTHS)
    ]


def alone(model: LoadedModel, submit: Submit) -> list[int]:
    """The tokens of a request that has an engine for itself."""
    stepped = Stepped(model, step_tokens=256).run(submit)
    stepped.check_empty()
    return stepped.tokens(submit.request_id)


@pytest.fixture(scope="module")
def alone_tokens(loaded: LoadedModel) -> dict[float, list[list[int]]]:
    modes: list[dict[str, object]] = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95}]
    return {float(mode["temperature"]): [alone(loaded, s) for s in batch(mode)] for mode in modes}  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- what runs beside


def test_seeds_matter(loaded: LoadedModel) -> None:
    """Or the comparisons below would show nothing."""
    prompt = a_prompt(20)
    answers = {tuple(alone(loaded, a_submit("r", prompt, temperature=0.8, seed=seed))) for seed in range(5)}
    assert len(answers) == 5
    assert len(set(alone(loaded, a_submit("r", prompt)))) > 3


@MODES
@pytest.mark.parametrize("step_tokens", [9, 16, 64, 512])
def test_same_tokens_alone_and_in_a_batch_whatever_the_chunks(
    loaded: LoadedModel, alone_tokens: dict[float, list[list[int]]], sampling: dict[str, object], step_tokens: int
) -> None:
    stepped = Stepped(loaded, step_tokens=step_tokens).run(*batch(sampling))
    reports = [e for e in stepped.events if isinstance(e, StepReport)]
    assert max(r.decode_requests for r in reports) > 4
    assert all(r.prefill_tokens + r.decode_requests <= step_tokens for r in reports)
    assert [stepped.tokens(f"r{i}") for i in range(8)] == alone_tokens[sampling["temperature"]]  # type: ignore[index]
    stepped.check_empty()


@MODES
@pytest.mark.parametrize("block_tokens", [1, 4])
def test_same_tokens_after_preemptions(
    loaded: LoadedModel, alone_tokens: dict[float, list[list[int]]], sampling: dict[str, object], block_tokens: int
) -> None:
    stepped = Stepped(loaded, capacity_tokens=128, block_tokens=block_tokens, step_tokens=48)
    stepped.expecting_short_answers().run(*batch(sampling))
    assert stepped.preempted >= 3
    assert sum(stepped.outputs(f"r{i}")[-1].preemptions for i in range(8)) == stepped.preempted
    assert [stepped.tokens(f"r{i}") for i in range(8)] == alone_tokens[sampling["temperature"]]  # type: ignore[index]
    stepped.check_empty()


def test_same_tokens_when_they_come_and_go(loaded: LoadedModel, alone_tokens: dict[float, list[list[int]]]) -> None:
    """Others are submitted and cancelled in the middle; slots change hands."""
    stepped = Stepped(loaded, num_slots=3, step_tokens=20)
    stepped.handle(*batch({"temperature": 0.8, "top_p": 0.95}))
    for i in range(12):
        stepped.handle(a_submit(f"other{i}", a_prompt(30 + i, 50 + i), priority=i % 3))
        stepped.step(3)
        stepped.handle(Release(f"other{i - 2}"))
    for i in range(12):
        stepped.handle(Release(f"other{i}"))
    stepped.run()
    assert [stepped.tokens(f"r{i}") for i in range(8)] == alone_tokens[0.8]
    stepped.check_empty()


def test_tokens_are_drawn_from_the_models_own_logits(llama: Path, loaded: LoadedModel) -> None:
    """By seed and absolute position, and after the tokens before: nothing else goes in."""
    prompt = a_prompt(30)
    submit = a_submit("r", prompt, temperature=0.8, top_p=0.95, seed=11, repetition_penalty=1.2, frequency_penalty=0.1)
    tokens = alone(loaded, submit)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0]
    for i, token in enumerate(tokens):
        row = SampleRow(submit.sampling, len(prompt) + i, prompt, tokens[:i])
        assert sample(logits[len(prompt) + i - 1][None], [row]) == [token]


@MODES
@pytest.mark.parametrize("delivered", [1, 7, 23])
def test_a_resumed_request_goes_on_exactly(loaded: LoadedModel, sampling: dict[str, object], delivered: int) -> None:
    fields = {**sampling, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    prompt = a_prompt(30)
    whole = alone(loaded, a_submit("r", prompt, max_tokens=24, **fields))
    stepped = Stepped(loaded).run(a_submit("r", prompt, generated=whole[:delivered], max_tokens=24, **fields))
    assert stepped.outputs("r")[0].index == delivered
    assert stepped.tokens("r") == whole[delivered:]
    assert stepped.finish_reason("r") is FinishReason.LENGTH


@MODES
def test_penalties_do_not_depend_on_the_way_there(loaded: LoadedModel, sampling: dict[str, object]) -> None:
    fields = {**sampling, "repetition_penalty": 1.3, "frequency_penalty": 0.2}
    expected = [alone(loaded, submit) for submit in batch(fields)]
    stepped = Stepped(loaded, capacity_tokens=176, block_tokens=4, step_tokens=48)
    stepped.expecting_short_answers().run(*batch(fields))
    assert stepped.preempted > 0
    assert [stepped.tokens(f"r{i}") for i in range(8)] == expected


def test_bfloat16_runs(loaded_bfloat16: LoadedModel, alone_tokens: dict[float, list[list[int]]]) -> None:
    stepped = Stepped(loaded_bfloat16, step_tokens=32).run(*batch({"temperature": 0.0}))
    answers = [stepped.tokens(f"r{i}") for i in range(8)]
    assert [len(answer) for answer in answers] == [24] * 8
    # Not the same arithmetic, but the same model.
    assert sum(a[0] == b[0] for a, b in zip(answers, alone_tokens[0.0], strict=True)) >= 5
    stepped.check_empty()


# ------------------------------------------------------------------------------------------ handoff


@pytest.mark.parametrize("start_token", [0, 13, 49])
@pytest.mark.parametrize("step_tokens", [16, 256])
def test_prefill_tells_of_every_token_once_before_its_output(
    loaded: LoadedModel, start_token: int, step_tokens: int
) -> None:
    stepped = Stepped(loaded, step_tokens=step_tokens)
    stepped.run(a_submit("bystander", a_prompt(21)), a_submit("p", a_prompt(50), Role.PREFILL, start_token=start_token))
    events = stepped.of("p")
    assert [type(e) for e in events] == [KvReady] * (len(events) - 1) + [Output]
    ready = [e for e in events if isinstance(e, KvReady)]
    for layer in range(len(loaded.spec.layers)):
        ranges = [(e.start, e.stop) for e in ready if e.layer == layer]
        covered = list(itertools.chain.from_iterable(range(start, stop) for start, stop in ranges))
        assert covered == list(range(start_token, 50))
        assert all(start < stop for start, stop in ranges)
    assert len({e.slot for e in ready}) == 1


def test_what_prefill_tells_is_already_there_for_good(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, step_tokens=16)
    early: dict[tuple[int, int, int], list[bytes]] = {}
    collect = stepped.engine._emit

    def emit(events: list[object]) -> None:
        for e in events:
            if isinstance(e, KvReady):
                parts = stepped.kv(e.slot, e.start, e.stop)[2 * e.layer : 2 * e.layer + 2]
                early[e.layer, e.start, e.stop] = parts
        collect(events)  # type: ignore[arg-type]

    stepped.engine._emit = emit  # type: ignore[assignment]
    stepped.run(a_submit("p", a_prompt(50), Role.PREFILL), a_submit("other", a_prompt(30)))
    assert len(early) >= 8
    for (layer, start, stop), parts in early.items():
        assert stepped.kv(stepped.slot("p"), start, stop)[2 * layer : 2 * layer + 2] == parts
        assert any(parts[0])


def test_prefill_is_held_until_released(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, num_slots=2).run(a_submit("p", a_prompt(50), Role.PREFILL, max_tokens=1))
    slot, before = stepped.slot("p"), None
    assert stepped.finish_reason("p") is FinishReason.LENGTH
    before = stepped.kv(slot, 0, 50)
    stepped.run(*(a_submit(f"r{i}", a_prompt(60, i)) for i in range(5)))
    assert stepped.kv(slot, 0, 50) == before
    state = stepped.engine.debug_state()
    assert state.requests == ["p"]
    assert state.free_slots == 1
    stepped.run(Release("p"))
    stepped.check_empty()


@MODES
@pytest.mark.parametrize("length", [1, 2, 40, 65])
@pytest.mark.parametrize("model", ["loaded", "loaded_bfloat16"])
def test_a_handoff_changes_nothing(
    request: pytest.FixtureRequest, sampling: dict[str, object], length: int, model: str
) -> None:
    """Prefill in one engine, decode in another: tokens and KV bytes as if one engine had done it all."""
    loaded = request.getfixturevalue(model)
    fields = {**sampling, "seed": 9, "max_tokens": 20}
    prompt = a_prompt(length, 3)
    whole = Stepped(loaded).run(a_submit("r", prompt, **fields))
    first = Stepped(loaded, num_slots=3).run(a_submit("p", prompt, Role.PREFILL, **fields))
    second = Stepped(loaded, num_slots=5)
    second.handle(a_submit("other", a_prompt(40, 8), max_tokens=3, ignore_eos=True))
    second.step()  # so that the request gets another slot than in the first engine
    second.run(a_submit("d", prompt, Role.RECEIVE, **fields))
    assert second.slot("d") != first.slot("p")
    second.write_kv(second.slot("d"), 0, first.kv(first.slot("p"), 0, length))
    (token,) = first.tokens("p")
    second.run(Commit("d", [token]))
    assert second.outputs("d")[0].index == 1
    assert [token, *second.tokens("d")] == whole.tokens("r")
    assert second.finish_reason("d") is whole.finish_reason("r")
    assert second.kv(second.slot("d"), 0, length + 19) == whole.kv(0, 0, length + 19)
    second.check_empty()


def test_a_handoff_may_stop_and_the_prompt_be_computed_here(loaded: LoadedModel) -> None:
    submit = a_submit("d", a_prompt(40), Role.RECEIVE, temperature=0.8, seed=2)
    expected = alone(loaded, a_submit("r", a_prompt(40), temperature=0.8, seed=2))
    stepped = Stepped(loaded, step_tokens=16).run(submit)
    assert [type(e) for e in stepped.of("d")] == [Reserved]
    garbage = [b"\x77" * len(part) for part in stepped.kv(stepped.slot("d"), 0, 33)]
    stepped.write_kv(stepped.slot("d"), 0, garbage)
    stepped.run(ComputeHere("d"))
    assert stepped.tokens("d") == expected
    stepped.check_empty()


@MODES
@pytest.mark.parametrize("elsewhere", [1, 2, 9, 19])
@pytest.mark.parametrize("way", ["commit", "compute here"])
def test_a_request_that_began_elsewhere_goes_on_exactly(
    loaded: LoadedModel, sampling: dict[str, object], elsewhere: int, way: str
) -> None:
    """The prefill worker may have generated some tokens before the KV is here, or before it was lost."""
    fields = {**sampling, "seed": 9, "repetition_penalty": 1.2}
    prompt = a_prompt(40, 3)
    first = Stepped(loaded).run(a_submit("r", prompt, max_tokens=20, **fields))
    tokens = first.tokens("r")
    second = Stepped(loaded, step_tokens=16, block_tokens=4)
    second.run(a_submit("d", prompt, Role.RECEIVE, max_tokens=20, **fields))
    if way == "commit":
        second.write_kv(second.slot("d"), 0, first.kv(0, 0, 40 + elsewhere - 1))
        second.run(Commit("d", tokens[:elsewhere]))
    else:
        second.run(ComputeHere("d", tokens[:elsewhere]))
    assert second.outputs("d")[0].index == elsewhere
    assert second.tokens("d") == tokens[elsewhere:]
    second.check_empty()


def test_a_preempted_receiver_goes_on_exactly(loaded: LoadedModel) -> None:
    prompt = a_prompt(40)
    expected = alone(loaded, a_submit("r", prompt, max_tokens=40))
    prefill = Stepped(loaded).run(a_submit("p", prompt, Role.PREFILL))
    stepped = Stepped(loaded, capacity_tokens=128, block_tokens=4).expecting_short_answers()
    stepped.handle(a_submit("first", a_prompt(40, 1), max_tokens=60))
    stepped.handle(a_submit("d", prompt, Role.RECEIVE, max_tokens=40))
    stepped.step()
    stepped.write_kv(stepped.slot("d"), 0, prefill.kv(prefill.slot("p"), 0, 40))
    stepped.run(Commit("d", [prefill.tokens("p")[0]]))
    assert stepped.outputs("d")[-1].preemptions > 0
    assert len([e for e in stepped.of("d") if isinstance(e, Reserved)]) == 1
    assert [*prefill.tokens("p"), *stepped.tokens("d")] == expected


def test_commands_for_nobody_are_ignored(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded)
    stepped.run(Commit("x", [5]), ComputeHere("x"), Release("x"), a_submit("r", a_prompt(5)))
    stepped.run(Commit("r", [5]), Release("r"), Release("r"))
    assert len(stepped.tokens("r")) == 16
    stepped.check_empty()


def test_a_second_commit_or_compute_here_changes_nothing(loaded: LoadedModel) -> None:
    expected = alone(loaded, a_submit("r", a_prompt(40)))
    stepped = Stepped(loaded).run(a_submit("d", a_prompt(40), Role.RECEIVE))
    stepped.handle(ComputeHere("d"), Commit("d", [7]), ComputeHere("d"))
    assert stepped.run().tokens("d") == expected


# ------------------------------------------------------------------------------------ giving back


STATES = (
    *("waiting", "reserved", "in its prompt", "prompt but one", "decoding"),
    *("committed", "held", "preempted", "finished"),
)


@pytest.mark.parametrize("state", STATES)
def test_release_in_any_state_gives_everything_back(loaded: LoadedModel, state: str) -> None:
    stepped = Stepped(loaded, num_slots=2, step_tokens=16, capacity_tokens=128, block_tokens=4)
    role = {"reserved": Role.RECEIVE, "committed": Role.RECEIVE, "held": Role.PREFILL}.get(state, Role.GENERATE)
    fresh = stepped.engine.debug_state()
    length = 33 if state == "prompt but one" else 40
    if state == "preempted":
        stepped.expecting_short_answers().handle(a_submit("first", a_prompt(50), max_tokens=70))
    stepped.handle(a_submit("r", a_prompt(length), role, max_tokens=30))
    if state in ("in its prompt", "prompt but one"):
        stepped.step(2)
    elif state == "decoding":
        stepped.step(5)
    elif state == "preempted":
        stepped.until(lambda: stepped.preempted > 0)
        stepped.handle(Release("first"))
    elif state != "waiting":
        stepped.run()
    if state == "committed":
        stepped.handle(Commit("r", [5]))
    before = len(stepped.events)
    stepped.handle(Release("r"), Release("r"))
    stepped.check_empty()
    after = stepped.engine.debug_state()
    assert dataclasses.asdict(Holdings.of(after)) == dataclasses.asdict(Holdings.of(fresh))
    assert stepped.events[before:] == []
    # And it can all be used again.
    stepped.run(*(a_submit(f"next{i}", a_prompt(60, i), max_tokens=4) for i in range(4)))
    assert all(len(stepped.tokens(f"next{i}")) == 4 for i in range(4))
    stepped.check_empty()


@dataclasses.dataclass(frozen=True)
class Holdings:
    requests: tuple[str, ...]
    free_slots: int
    used_tokens: int

    @classmethod
    def of(cls, state: DebugState) -> Holdings:
        return cls(tuple(state.requests), state.free_slots, state.used_tokens)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_commands_ends_with_nothing_held(loaded: LoadedModel, data: st.DataObject) -> None:
    stepped = Stepped(loaded, num_slots=3, step_tokens=16, capacity_tokens=96, block_tokens=4, slot_tokens=64)
    names = [f"r{i}" for i in range(6)]
    submitted: set[str] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        name = data.draw(st.sampled_from(names))
        match data.draw(st.sampled_from(["submit", "step", "step", "commit", "compute", "release"])):
            case "submit" if name not in submitted:
                length = data.draw(st.integers(1, 40))
                role = data.draw(st.sampled_from(Role))
                stepped.handle(a_submit(name, a_prompt(length, length), role, max_tokens=data.draw(st.integers(1, 30))))
                submitted.add(name)
            case "commit":
                stepped.handle(Commit(name, [5]))
            case "compute":
                stepped.handle(ComputeHere(name))
            case "release":
                stepped.handle(Release(name))
            case _ if stepped.engine.has_work:
                stepped.step()
    stepped.run(*(Release(name) for name in names))
    assert not [e for e in stepped.events if isinstance(e, Failed)]
    stepped.check_empty()


def test_inspect_report_idle_and_stop(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, num_slots=2, block_tokens=16)
    stepped.run(Inspect(41), a_submit("p", a_prompt(20), Role.PREFILL), Inspect(42))
    first, second = [e for e in stepped.events if isinstance(e, DebugState)]
    assert (first.token, first.requests) == (41, [])
    assert (second.token, second.requests) == (42, ["p"])
    stepped.engine.tell_idle()
    stepped.engine.tell_idle()
    reports = [e for e in stepped.events if isinstance(e, StepReport)]
    assert len(reports) == 2
    assert (reports[-1].running, reports[-1].used_tokens) == (1, 32)
    assert reports[-1].used_tokens + reports[-1].free_tokens == stepped.engine.capacity_tokens
    stepped.handle(Release("p"))
    stepped.engine.tell_idle()
    last = stepped.events[-1]
    assert isinstance(last, StepReport)
    assert last.used_tokens == 0
    assert not stepped.engine.stopped
    stepped.handle(Stop())
    assert stepped.engine.stopped


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"token_ids": [], "num_prompt_tokens": 0}, FailureReason.INVALID, "0 tokens"),
        ({"num_prompt_tokens": 0}, FailureReason.INVALID, "prompt of 0"),
        ({"num_prompt_tokens": 11}, FailureReason.INVALID, "prompt of 11"),
        ({"num_prompt_tokens": 6}, FailureReason.INVALID, "already generated"),
        ({"start_token": 10}, FailureReason.INVALID, "start_token 10"),
        ({"start_token": -1}, FailureReason.INVALID, "start_token -1"),
        ({"token_ids": [5] * 9 + [384]}, FailureReason.INVALID, "vocabulary of 384"),
        ({"token_ids": [-1] + [5] * 9}, FailureReason.INVALID, "vocabulary of 384"),
        ({"token_ids": [5] * 64, "num_prompt_tokens": 64}, FailureReason.INVALID, "context of 48"),
        ({"token_ids": [5] * 48, "num_prompt_tokens": 48}, FailureReason.INVALID, "context of 48"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    loaded: LoadedModel, fields: dict[str, object], reason: FailureReason, words: str
) -> None:
    stepped = Stepped(loaded, slot_tokens=64, capacity_tokens=48)
    good = a_submit("r", [5] * 10, max_tokens=4)
    stepped.handle(Submit(**({name: getattr(good, name) for name in good.__struct_fields__} | fields)))
    assert stepped.failure("r").reason is reason
    assert words in stepped.failure("r").message
    stepped.check_empty()
    stepped.run(good)
    assert len(stepped.tokens("r")) == 4


def test_the_longest_that_fits_is_taken(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, slot_tokens=64, capacity_tokens=48)
    stepped.run(a_submit("r", a_prompt(47), max_tokens=99))
    assert len(stepped.tokens("r")) == 1
    assert stepped.finish_reason("r") is FinishReason.LENGTH


def test_a_full_queue_refuses(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, num_slots=1, max_waiting=2)
    stepped.handle(*(a_submit(f"r{i}", a_prompt(5)) for i in range(3)))
    assert stepped.failure("r2").reason is FailureReason.OVERLOADED
    assert "2 requests" in stepped.failure("r2").message
    stepped.step()  # one gets the slot
    stepped.handle(a_submit("r3", a_prompt(5)), a_submit("r4", a_prompt(5)))
    assert stepped.failure("r4").reason is FailureReason.OVERLOADED
    stepped.run()
    assert all(len(stepped.tokens(name)) == 16 for name in ("r0", "r1", "r3"))


def test_an_id_in_use_is_refused_and_its_owner_unharmed(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded)
    stepped.handle(a_submit("r", a_prompt(5)))
    stepped.step()
    stepped.handle(a_submit("r", a_prompt(9)))
    assert stepped.failure("r").reason is FailureReason.INVALID
    stepped.run()
    assert len(stepped.tokens("r")) == 16


# ---------------------------------------------------------------------------------------------- end


def ending(model: LoadedModel, **fields: object) -> tuple[list[int], FinishReason | None]:
    stepped = Stepped(model, slot_tokens=64).run(a_submit("r", a_prompt(30), **fields))  # type: ignore[arg-type]
    stepped.check_empty()
    return stepped.tokens("r"), stepped.finish_reason("r")


EOS = 0


def test_max_tokens_ends(loaded: LoadedModel) -> None:
    assert ending(loaded, max_tokens=1)[1] is FinishReason.LENGTH
    for count in (1, 2, 9):
        assert len(ending(loaded, max_tokens=count)[0]) == count


def test_full_context_ends(loaded: LoadedModel) -> None:
    tokens, reason = ending(loaded, max_tokens=1000)
    assert (len(tokens), reason) == (34, FinishReason.LENGTH)


def test_end_of_sequence_ends_unless_ignored(loaded: LoadedModel) -> None:
    assert loaded.spec.eos_token_ids == (EOS,)
    free, _ = ending(loaded)
    # A bias that wins only against some tokens: the end token comes somewhere in the middle.
    bias = {EOS: 1000.0}
    assert ending(loaded, ignore_eos=False, logit_bias=bias) == ([EOS], FinishReason.STOP)
    assert ending(loaded, ignore_eos=True, logit_bias=bias) == ([EOS] * 16, FinishReason.LENGTH)
    assert EOS not in free


def test_stop_tokens_end_even_where_the_models_own_are_ignored(loaded: LoadedModel) -> None:
    free, _ = ending(loaded)
    stop = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    at = free.index(stop)
    for ignore_eos in (True, False):
        tokens, reason = ending(loaded, stop_token_ids=(stop, 383), ignore_eos=ignore_eos)
        assert (tokens, reason) == (free[: at + 1], FinishReason.STOP)


def test_min_tokens_holds_ends_back(loaded: LoadedModel) -> None:
    for stops in (
        {"stop_token_ids": (7,), "logit_bias": {7: 1000.0}},
        {"ignore_eos": False, "logit_bias": {EOS: 1000.0}},
    ):
        tokens, reason = ending(loaded, min_tokens=5, **stops)
        end = tokens[-1]
        assert (len(tokens), reason) == (6, FinishReason.STOP)
        assert end not in tokens[:-1]


def test_min_tokens_counts_what_was_delivered_before(loaded: LoadedModel) -> None:
    tokens, reason = ending(loaded, generated=[9, 9, 9], min_tokens=5, stop_token_ids=(7,), logit_bias={7: 1000.0})
    assert (len(tokens), tokens[-1], reason) == (3, 7, FinishReason.STOP)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ignore_eos": False}, FinishReason.STOP),
        ({"stop_token_ids": (EOS,)}, FinishReason.STOP),
        ({"max_tokens": 1}, FinishReason.LENGTH),
        ({}, None),
    ],
)
def test_a_committed_token_may_be_the_last(
    loaded: LoadedModel, fields: dict[str, object], reason: FinishReason | None
) -> None:
    stepped = Stepped(loaded).run(a_submit("d", a_prompt(10), Role.RECEIVE, **fields))  # type: ignore[arg-type]
    stepped.handle(Commit("d", [EOS]))
    if reason is None:
        assert stepped.outputs("d") == []
        stepped.run()
        assert len(stepped.tokens("d")) == 15
    else:
        (output,) = stepped.outputs("d")
        assert (output.index, output.token_ids, output.finish_reason) == (1, [], reason)
    stepped.check_empty()


def test_a_commit_that_fills_the_context_ends(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, slot_tokens=32).run(a_submit("d", a_prompt(31), Role.RECEIVE))
    stepped.handle(Commit("d", [9]))
    assert stepped.finish_reason("d") is FinishReason.LENGTH
    stepped.check_empty()


@pytest.mark.parametrize("token_ids", [[384], [5, -1], [5] * 247])
@pytest.mark.parametrize("command", [Commit, ComputeHere])
def test_impossible_tokens_from_elsewhere_fail_the_request(
    loaded: LoadedModel, command: type[Commit | ComputeHere], token_ids: list[int]
) -> None:
    stepped = Stepped(loaded).run(a_submit("d", a_prompt(10), Role.RECEIVE, max_tokens=1000))
    stepped.handle(command("d", token_ids))
    assert stepped.failure("d").reason is FailureReason.INTERNAL
    stepped.check_empty()


# --------------------------------------------------------------------------------------------- time


class Ticking:
    """A clock that advances only by hand."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


def slow_down(stepped: Stepped, clock: Ticking, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes 10 ns."""
    run = stepped.engine.runner.run

    def slow_run(*arguments: object) -> object:
        clock.now += 10
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stepped.engine.runner, "run", slow_run)


def test_every_nanosecond_is_queue_or_compute(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    stepped = Stepped(loaded, clock=clock, num_slots=1, step_tokens=16)
    slow_down(stepped, clock, monkeypatch)
    stepped.handle(a_submit("a", a_prompt(20), max_tokens=2))
    clock.now += 5
    stepped.handle(a_submit("b", a_prompt(10), max_tokens=2))
    for _ in range(5):
        clock.now += 100
        stepped.step()
    first, second = stepped.outputs("a"), stepped.outputs("b")
    # a: waits 105, two chunks with 100 between them, then another 100 and a token.
    assert [(o.queue_ns, o.compute_ns) for o in first] == [(205, 20), (305, 30)]
    # b: waits for a's slot, 3 x 110 + 100, is admitted and computed in the step after a's last.
    assert [(o.queue_ns, o.compute_ns) for o in second] == [(430, 10), (530, 20)]


def test_a_receivers_time_counts_from_commit(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking()
    stepped = Stepped(loaded, clock=clock)
    slow_down(stepped, clock, monkeypatch)
    stepped.handle(a_submit("c", a_prompt(20), Role.RECEIVE), a_submit("h", a_prompt(20), Role.RECEIVE))
    clock.now += 7
    stepped.step()
    assert [e.queue_ns for e in stepped.events if isinstance(e, Reserved)] == [7, 7]
    clock.now += 1000  # the KV travels
    stepped.handle(Commit("c", [5]), ComputeHere("h"))
    clock.now += 30
    stepped.step()
    assert [(o.queue_ns, o.compute_ns) for name in "ch" for o in stepped.outputs(name)] == [(30, 10), (30, 10)]


# ------------------------------------------------------------------------------------- broken numbers

POISON = 66
"""A token whose embedding is NaN in the poisoned model."""


@pytest.fixture
def poisoned(llama: Path) -> LoadedModel:
    """The model with one token that is NaN. Its answers without that token are the same."""
    poisoned = load(EngineConfig(model=llama))
    assert POISON not in poisoned.reference_ids
    with torch.no_grad():
        poisoned.module.get_input_embeddings().weight[POISON] = torch.nan
    return poisoned


def short_and_long() -> tuple[Submit, Submit]:
    """They take slots 0 and 1 and share attention calls; the first reads far past its own end."""
    return a_submit("short", a_prompt(4, 1)), a_submit("long", a_prompt(45, 2))


def check_unharmed(stepped: Stepped, model: LoadedModel) -> None:
    """Slot 0 was used by somebody poisoned. The next in it answers as ever."""
    stepped.check_empty()
    stepped.run(*short_and_long())
    for submit in short_and_long():
        assert stepped.tokens(submit.request_id) == alone(model, submit)


def test_nan_fails_its_request_only(loaded: LoadedModel, poisoned: LoadedModel) -> None:
    stepped = Stepped(poisoned)
    prompt = a_prompt(30)
    prompt[20] = POISON
    stepped.run(a_submit("good", a_prompt(25)), a_submit("bad", prompt), a_submit("fine", a_prompt(35)))
    assert stepped.failure("bad").reason is FailureReason.INTERNAL
    assert "nan" in stepped.failure("bad").message
    assert stepped.tokens("bad") == []
    assert stepped.tokens("good") == alone(loaded, a_submit("good", a_prompt(25)))
    assert stepped.tokens("fine") == alone(loaded, a_submit("fine", a_prompt(35)))
    check_unharmed(stepped, loaded)


def test_nan_of_a_failed_request_reaches_nobody(loaded: LoadedModel, poisoned: LoadedModel) -> None:
    stepped = Stepped(poisoned).run(a_submit("bad", [POISON] * 50))
    assert stepped.failure("bad").reason is FailureReason.INTERNAL
    check_unharmed(stepped, loaded)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_nan_of_a_request_cancelled_in_its_prompt_reaches_nobody(
    loaded: LoadedModel, poisoned: LoadedModel, steps: int
) -> None:
    """Also where only the last token of the prompt was still missing."""
    stepped = Stepped(poisoned, step_tokens=16)
    stepped.handle(a_submit("bad", [POISON] * 49))
    stepped.step(steps)
    stepped.handle(Release("bad"))
    check_unharmed(stepped, loaded)


@pytest.mark.parametrize("end", ["release", "commit and release", "commit and fail", "commit and stop"])
def test_nan_received_from_elsewhere_reaches_nobody(loaded: LoadedModel, end: str) -> None:
    stepped = Stepped(loaded).run(a_submit("bad", a_prompt(50), Role.RECEIVE, stop_token_ids=(7,)))
    nan = torch.full((1,), torch.nan).numpy().tobytes()
    stepped.write_kv(stepped.slot("bad"), 0, [nan * (len(p) // 4) for p in stepped.kv(stepped.slot("bad"), 0, 50)])
    if end != "release":
        stepped.handle(Commit("bad", [7 if end == "commit and stop" else 5]))
    if end == "commit and fail":
        stepped.run()
        assert stepped.failure("bad").reason is FailureReason.INTERNAL
    stepped.handle(Release("bad"))
    check_unharmed(stepped, loaded)


@pytest.mark.parametrize("end", ["release", "commit and release", "commit and stop", "commit of nonsense"])
def test_nan_received_behind_the_prompt_reaches_nobody(loaded: LoadedModel, end: str) -> None:
    """Keys and values of tokens generated elsewhere lie behind those that were reserved for."""
    stepped = Stepped(loaded).run(a_submit("bad", a_prompt(20), Role.RECEIVE, max_tokens=99, stop_token_ids=(7,)))
    nan = torch.full((1,), torch.nan).numpy().tobytes()
    stepped.write_kv(stepped.slot("bad"), 0, [nan * (len(p) // 4) for p in stepped.kv(stepped.slot("bad"), 0, 50)])
    if end != "release":
        last = {"commit and stop": 7, "commit of nonsense": 384}.get(end, 5)
        stepped.handle(Commit("bad", [*[5] * 30, last]))
    stepped.handle(Release("bad"))
    check_unharmed(stepped, loaded)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_nan_that_a_window_hides_reaches_nobody(tmp_path: Path, family: str) -> None:
    """Far enough back for no layer to read it, NaN does not keep a request from ending well."""
    model = load(EngineConfig(model=model_zoo.build(family, tmp_path / "model")))
    prompt = a_prompt(60)
    prefill = Stepped(model).run(a_submit("p", prompt, Role.PREFILL))
    stepped = Stepped(model).run(a_submit("bad", prompt, Role.RECEIVE, max_tokens=5))
    stepped.write_kv(0, 0, prefill.kv(prefill.slot("p"), 0, 60))
    for keys, values, layer in zip(
        stepped.engine.pool.keys, stepped.engine.pool.values, model.spec.layers, strict=True
    ):
        if layer.window:
            keys[0, :20] = values[0, :20] = torch.nan
    stepped.run(Commit("bad", [prefill.tokens("p")[0]]))
    assert stepped.finish_reason("bad") is FinishReason.LENGTH
    check_unharmed(stepped, model)


def test_a_failing_step_fails_who_was_in_it_and_the_engine_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = Stepped(loaded, num_slots=2)
    stepped.handle(*(a_submit(f"r{i}", a_prompt(20, i)) for i in range(3)))
    stepped.step(2)

    def broken(*arguments: object) -> object:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(stepped.engine.runner, "run", broken)
        stepped.step()
    for name in ("r0", "r1"):
        assert stepped.failure(name).reason is FailureReason.INTERNAL
        assert "out of memory" in stepped.failure(name).message
    stepped.run()
    assert stepped.tokens("r2") == alone(loaded, a_submit("r2", a_prompt(20, 2)))
    stepped.check_empty()


def test_after_cancelled_long_prompts_a_short_one_is_next(loaded: LoadedModel) -> None:
    """Whether they had begun, held a slot, or waited: what they would have computed is not waited for."""
    stepped = Stepped(loaded, num_slots=4, step_tokens=32)
    long = [a_submit(f"long-{i}", a_prompt(200, i), Role.PREFILL) for i in range(10)]
    stepped.handle(*long)
    stepped.step(3)
    stepped.handle(*(Release(submit.request_id) for submit in long), a_submit("short", a_prompt(8), max_tokens=4))
    stepped.step()
    assert len(stepped.tokens("short")) == 1
    stepped.run()
    assert all(not stepped.outputs(submit.request_id) for submit in long)
    stepped.check_empty()
