"""An engine that keeps prefixes gives the tokens that one without gives, computes less, and shares with nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.config import EngineConfig
from baton.engine.layout import LayerSpec
from baton.engine.loader import LoadedModel, load
from baton.engine.messages import (
    Commit,
    ComputeHere,
    Failed,
    KvReady,
    Release,
    Reserved,
    Role,
    StepReport,
    Submit,
)
from tests import model_zoo
from tests.engine.conftest import Stepped, a_prompt, a_submit

MODES = pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95}], ids=str)
BLOCK = 16


def salted(submit: Submit, salt: bytes = b"", *, prefix_cache: bool = True) -> Submit:
    fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
    return Submit(**(fields | {"cache_salt": salt, "prefix_cache": prefix_cache}))


def without(model: LoadedModel, submit: Submit) -> list[int]:
    """The tokens of an engine that keeps nothing and has nothing else to do."""
    stepped = Stepped(model, step_tokens=256, prefix_cache=False).run(submit)
    return stepped.tokens(submit.request_id)


def hits(stepped: Stepped) -> int:
    return sum(e.hit_tokens for e in stepped.events if isinstance(e, StepReport))


def computed(stepped: Stepped) -> int:
    return sum(e.prefill_tokens for e in stepped.events if isinstance(e, StepReport))


# ------------------------------------------------------------------------------------------- exactness


@MODES
@pytest.mark.parametrize("length", [15, 16, 17, 32, 33, 100])
def test_the_same_request_again(loaded: LoadedModel, sampling: dict[str, object], length: int) -> None:
    fields = {**sampling, "seed": 4}
    expected = without(loaded, a_submit("r", a_prompt(length), **fields))
    stepped = Stepped(loaded)
    for name in ("first", "second", "third"):
        before = computed(stepped)
        stepped.run(a_submit(name, a_prompt(length), **fields))
        assert stepped.tokens(name) == expected
        hit = 0 if name == "first" else (length - 1) // BLOCK * BLOCK
        assert stepped.outputs(name)[-1].cached_tokens == hit
        assert computed(stepped) - before == length - hit
    stepped.check_empty()
    assert stepped.engine.debug_state().kept_slots == (1 if length + 15 >= BLOCK else 0)


@MODES
def test_many_that_begin_alike_at_once(loaded: LoadedModel, sampling: dict[str, object]) -> None:
    """One computes what they share; the others copy it while it still runs, and go their own ways."""
    common = a_prompt(70, 9)
    submits = [a_submit(f"r{i}", common + a_prompt(5 + 7 * i, i), seed=i, **sampling) for i in range(5)]
    stepped = Stepped(loaded, step_tokens=100)
    stepped.handle(submits[0])
    stepped.step(2)
    stepped.run(*submits[1:])
    assert hits(stepped) == 4 * 64
    for submit in submits:
        assert stepped.tokens(submit.request_id) == without(loaded, submit)
    stepped.check_empty()


@MODES
def test_a_conversation_goes_on_from_its_own_answers(loaded: LoadedModel, sampling: dict[str, object]) -> None:
    stepped, history = Stepped(loaded), a_prompt(20)
    for turn in range(4):
        submit = a_submit(f"turn{turn}", history, max_tokens=20, seed=turn, **sampling)
        stepped.run(submit)
        answer = stepped.tokens(submit.request_id)
        assert answer == without(loaded, submit)
        if turn:
            # All but the last token of the answer before had been computed, and the new words had not.
            assert stepped.outputs(submit.request_id)[0].cached_tokens == (len(history) - 9) // BLOCK * BLOCK
        history = history + answer + a_prompt(8, 100 + turn)
    assert stepped.engine.debug_state().kept_slots == 1
    stepped.check_empty()


@MODES
def test_preempted_requests_find_what_they_had(loaded: LoadedModel, sampling: dict[str, object]) -> None:
    submits = [a_submit(f"r{i}", a_prompt(30 + i, i), max_tokens=24, seed=i, **sampling) for i in range(8)]
    stepped = Stepped(loaded, capacity_tokens=160, block_tokens=4, step_tokens=48)
    stepped.expecting_short_answers().run(*submits)
    assert stepped.preempted >= 2
    assert hits(stepped) > 0
    for submit in submits:
        assert stepped.tokens(submit.request_id) == without(loaded, submit)
    stepped.check_empty()


@MODES
@pytest.mark.parametrize("delivered", [1, 9, 20])
def test_a_resumed_request_finds_its_answer(loaded: LoadedModel, sampling: dict[str, object], delivered: int) -> None:
    fields = {**sampling, "seed": 5, "repetition_penalty": 1.2}
    whole = without(loaded, a_submit("r", a_prompt(40), max_tokens=24, **fields))
    stepped = Stepped(loaded, block_tokens=4).run(a_submit("first", a_prompt(40), max_tokens=24, **fields))
    stepped.run(a_submit("r", a_prompt(40), generated=whole[:delivered], max_tokens=24, **fields))
    assert stepped.tokens("r") == whole[delivered:]
    assert stepped.outputs("r")[0].cached_tokens == (40 + delivered - 1) // 4 * 4


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_a_cancelled_prompt_computed_is_kept(loaded: LoadedModel, steps: int) -> None:
    submit = a_submit("r", a_prompt(80))
    stepped = Stepped(loaded, step_tokens=16)
    stepped.handle(a_submit("cancelled", a_prompt(80)))
    stepped.step(steps)
    stepped.handle(Release("cancelled"))
    stepped.check_empty()
    stepped.run(submit)
    assert stepped.outputs("r")[0].cached_tokens == 16 * steps
    assert stepped.tokens("r") == without(loaded, submit)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_happens_answers_are_the_same(loaded: LoadedModel, data: st.DataObject) -> None:
    """Few slots, little memory, prompts that begin alike, roles, salts, cancels: eviction all the time."""
    stepped = Stepped(loaded, num_slots=3, step_tokens=24, capacity_tokens=112, block_tokens=4, slot_tokens=64)
    submits: dict[str, Submit] = {}
    for i in range(data.draw(st.integers(2, 12))):
        length = data.draw(st.integers(1, 40))
        alike = data.draw(st.sampled_from([0, 8, 20, 40]))
        prompt = (a_prompt(alike, 77) + a_prompt(40, i))[:length]
        role = data.draw(st.sampled_from([Role.GENERATE, Role.GENERATE, Role.PREFILL, Role.RECEIVE]))
        salt = data.draw(st.sampled_from([b"", b"", b"other"]))
        submits[f"r{i}"] = salted(a_submit(f"r{i}", prompt, role, max_tokens=12, seed=i, temperature=0.7), salt)
        stepped.handle(submits[f"r{i}"])
        for _ in range(data.draw(st.integers(0, 4))):
            if stepped.engine.has_work:
                stepped.step()
        for event in [e for e in stepped.events if isinstance(e, Reserved)]:
            stepped.handle(ComputeHere(event.request_id))
        if data.draw(st.integers(0, 3)) == 0:
            stepped.handle(Release(f"r{data.draw(st.integers(0, i))}"))
    for _ in range(3000):
        for event in [e for e in stepped.events if isinstance(e, Reserved)]:
            stepped.handle(ComputeHere(event.request_id))
        for name, submit in submits.items():
            if submit.role is Role.PREFILL and stepped.tokens(name):
                stepped.handle(Release(name))
        if not stepped.engine.has_work:
            break
        stepped.step()
    assert not [e for e in stepped.events if isinstance(e, Failed)]
    for name, submit in submits.items():
        expected = without(
            loaded, salted(a_submit(name, submit.token_ids, max_tokens=12, seed=int(name[1:]), temperature=0.7))
        )
        assert stepped.tokens(name) == expected[: len(stepped.tokens(name))]
    stepped.check_empty()


# ------------------------------------------------------------------------------------------- both tiers


@pytest.mark.parametrize("start_token", [0, 13, 40, 70])
def test_prefill_tells_what_it_has_at_once(loaded: LoadedModel, start_token: int) -> None:
    stepped = Stepped(loaded, step_tokens=16).run(a_submit("p", a_prompt(80), Role.PREFILL)).run(Release("p"))
    cold = Stepped(loaded, step_tokens=16, prefix_cache=False).run(a_submit("p", a_prompt(80), Role.PREFILL))
    stepped.handle(a_submit("q", a_prompt(80), Role.PREFILL, start_token=start_token))
    stepped.step()
    ready = [e for e in stepped.of("q") if isinstance(e, KvReady)]
    layers = len(loaded.spec.layers)
    if start_token < 64:
        assert [(e.layer, e.start, e.stop) for e in ready[:layers]] == [(i, start_token, 64) for i in range(layers)]
    for layer in range(layers):
        ranges = [(e.start, e.stop) for e in ready if e.layer == layer]
        covered = [token for start, stop in ranges for token in range(start, stop)]
        assert covered == list(range(start_token, 80))
    assert stepped.tokens("q") == cold.tokens("p")
    assert stepped.outputs("q")[0].cached_tokens == 64
    for mine, theirs in zip(stepped.kv(stepped.slot("q"), 0, 80), cold.kv(cold.slot("p"), 0, 80), strict=True):
        assert torch.allclose(*(torch.frombuffer(bytearray(part), dtype=torch.float32) for part in (mine, theirs)))


@MODES
def test_decode_asks_for_what_it_lacks(loaded: LoadedModel, sampling: dict[str, object]) -> None:
    """Two turns over two engines: the second turn's KV is what decode had, and the rest from prefill."""
    prefill, decode, history = Stepped(loaded), Stepped(loaded), a_prompt(50)
    for turn in range(3):
        fields = {**sampling, "seed": turn, "max_tokens": 20}
        expected = without(loaded, a_submit("r", history, **fields))
        name = f"turn{turn}"
        decode.run(a_submit(name, history, Role.RECEIVE, **fields))
        (reserved,) = [e for e in decode.of(name) if isinstance(e, Reserved)]
        assert reserved.cached_tokens == (0 if turn == 0 else (len(history) - 11) // BLOCK * BLOCK)
        prefill.run(a_submit(name, history, Role.PREFILL, start_token=reserved.cached_tokens, **fields))
        parts = prefill.kv(prefill.slot(name), reserved.cached_tokens, len(history))
        decode.write_kv(reserved.slot, reserved.cached_tokens, parts)
        decode.run(Commit(name, prefill.tokens(name)))
        prefill.run(Release(name))
        assert [*prefill.tokens(name), *decode.tokens(name)] == expected
        history = history + expected + a_prompt(10, 200 + turn)
    decode.check_empty()
    prefill.check_empty()


def test_a_lost_handoff_leaves_what_was_there(loaded: LoadedModel) -> None:
    """A peer that wrote nonsense behind the prefix, and was lost, harms neither this request nor the next."""
    stepped = Stepped(loaded).run(a_submit("first", a_prompt(64)))
    for end in ("released", "computed here"):
        stepped.run(a_submit(end, a_prompt(80), Role.RECEIVE))
        (reserved,) = [e for e in stepped.of(end) if isinstance(e, Reserved)]
        assert reserved.cached_tokens == 64
        nan = torch.full((1,), torch.nan).numpy().tobytes()
        stepped.write_kv(reserved.slot, 64, [nan * (len(p) // 4) for p in stepped.kv(reserved.slot, 64, 80)])
        stepped.run(Release(end) if end == "released" else ComputeHere(end))
        assert all(bool(torch.isfinite(t).all()) for t in (*stepped.engine.pool.keys, *stepped.engine.pool.values))
    assert stepped.tokens("computed here") == without(loaded, a_submit("r", a_prompt(80)))
    stepped.check_empty()


# ------------------------------------------------------------------------------------------- who shares


def test_tenants_share_nothing(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded).run(salted(a_submit("a", a_prompt(64)), b"one"))
    stepped.run(salted(a_submit("b", a_prompt(64)), b"two"), salted(a_submit("c", a_prompt(64)), b""))
    assert hits(stepped) == 0
    stepped.run(salted(a_submit("d", a_prompt(64)), b"one"))
    assert hits(stepped) == 48


def test_a_request_may_opt_out(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded).run(salted(a_submit("a", a_prompt(64)), prefix_cache=False))
    assert stepped.engine.debug_state().kept_tokens == 0
    stepped.run(a_submit("b", a_prompt(64)))
    stepped.run(salted(a_submit("c", a_prompt(64)), prefix_cache=False))
    assert hits(stepped) == 0
    reports = [e for e in stepped.events if isinstance(e, StepReport)]
    assert sum(e.looked_up_tokens for e in reports) == 64  # b's


def test_switched_off_nothing_is_kept(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, prefix_cache=False)
    for name in ("a", "b"):
        stepped.run(a_submit(name, a_prompt(64)))
    assert (hits(stepped), stepped.engine.debug_state().kept_slots) == (0, 0)


# ------------------------------------------------------------------------------------------- pressure


def test_what_is_kept_is_given_up_before_anybody_waits(loaded: LoadedModel) -> None:
    stepped = Stepped(loaded, num_slots=4, capacity_tokens=256, slot_tokens=256)
    stepped.run(*(a_submit(f"r{i}", a_prompt(50, i), max_tokens=10) for i in range(4)))
    state = stepped.engine.debug_state()
    assert (state.kept_slots, state.kept_tokens, state.used_tokens) == (4, 4 * 48, 0)
    stepped.handle(a_submit("large", a_prompt(230, 9), max_tokens=5))
    stepped.step()
    report = stepped.events[-1]
    assert isinstance(report, StepReport)
    assert (report.running, report.waiting, report.preempted) == (1, 0, 0)
    assert report.used_tokens + report.kept_tokens <= stepped.engine.capacity_tokens
    stepped.run()
    assert stepped.tokens("large") == without(loaded, a_submit("large", a_prompt(230, 9), max_tokens=5))


def test_memory_stays_within_what_may_be_held(loaded: LoadedModel) -> None:
    """Many different prompts through a small pool: what is touched is bounded by held and kept, and a slot's rest."""
    stepped = Stepped(loaded, num_slots=8, capacity_tokens=256, slot_tokens=256)
    for i in range(30):
        stepped.run(a_submit(f"r{i}", a_prompt(60, i), max_tokens=4))
    budget = stepped.engine.capacity_tokens * stepped.engine.layout.bytes_per_token
    assert stepped.engine.pool.touched_bytes <= 2 * budget
    stepped.check_empty()


# ------------------------------------------------------------------------------------ sliding windows


def windowed(tmp_path: Path, family: str) -> LoadedModel:
    return load(EngineConfig(model=model_zoo.build(family, tmp_path / "model")))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_hit_what_was_computed_here(tmp_path: Path, family: str) -> None:
    model = windowed(tmp_path, family)
    assert any(layer.window for layer in model.spec.layers)
    stepped, history = Stepped(model), a_prompt(60)
    for turn in range(3):
        submit = a_submit(f"t{turn}", history, max_tokens=10)
        stepped.run(submit)
        assert stepped.tokens(f"t{turn}") == without(model, submit)
        assert stepped.outputs(f"t{turn}")[0].cached_tokens == (0 if not turn else (len(history) - 6) // BLOCK * BLOCK)
        history = history + stepped.tokens(f"t{turn}") + a_prompt(5, turn)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_what_was_received_without_all_of_a_window_serves_nobody(tmp_path: Path, family: str) -> None:
    """A peer sends layers with a window no more than the window. A shorter prompt would need what lies before it."""
    model = windowed(tmp_path, family)
    prompt = a_prompt(90)
    prefill = Stepped(model).run(a_submit("p", prompt, Role.PREFILL))
    stepped = Stepped(model).run(a_submit("d", prompt, Role.RECEIVE))
    stepped.write_kv(stepped.slot("d"), 0, prefill.kv(prefill.slot("p"), 0, 90))
    for keys, values, layer in zip(
        stepped.engine.pool.keys, stepped.engine.pool.values, model.spec.layers, strict=True
    ):
        if layer.window:
            start = layer.first_seen(90)
            assert start > 0
            keys[stepped.slot("d"), :start] = values[stepped.slot("d"), :start] = 0.0
    stepped.run(Commit("d", prefill.tokens("p")))
    for length in (20, 40, 60, 89, 90):
        submit = a_submit(f"r{length}", prompt[:length], max_tokens=5)
        stepped.run(submit)
        assert stepped.tokens(submit.request_id) == without(model, submit)


def test_first_seen_is_what_attention_sees() -> None:
    layer = LayerSpec(key="0", heads=1, key_dim=1, value_dim=1)
    assert [layer.first_seen(p) for p in (0, 5)] == [0, 0]
    window = LayerSpec(key="0", heads=1, key_dim=1, value_dim=1, window=4)
    assert [window.first_seen(p) for p in (0, 3, 4, 9)] == [0, 0, 1, 6]
    chunk = LayerSpec(key="0", heads=1, key_dim=1, value_dim=1, chunk=4)
    assert [chunk.first_seen(p) for p in (0, 3, 4, 9)] == [0, 0, 4, 8]
