"""Incremental detokenizing equals decoding everything at once, and never shows half a character."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.text.detokenize import Detokenizer
from baton.text.tokenizer import Tokenizer

PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], skip)
    return [*(detokenizer.push([i]) for i in ids), detokenizer.flush()]


@PROPERTY
@given(text=st.text(st.sampled_from("the fox.é日🙂 \n"), max_size=40))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_plain(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(got)


@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_any_ids_equal_decode(data: st.DataObject, skip: bool, tokenizer: Tokenizer) -> None:
    if not tokenizer.byte_level:
        return  # byte fallback rewrites broken runs as a whole; see test_broken_bytes_are_not_held_for_ever
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    assert "".join(pieces(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip)


@PROPERTY
@given(data=st.data())
def test_any_ids_are_safe(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    prompt = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=5))
    one_by_one = "".join(pieces(tokenizer, ids, prompt))
    at_once = Detokenizer(tokenizer, prompt)
    assert at_once.push(ids) + at_once.flush() == one_by_one


def test_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("𓀀")  # not in the corpus: several tokens
    got = pieces(tokenizer, ids)
    shown = [piece for piece in got if piece.strip()]
    assert len(ids) > 1
    assert [piece.strip() for piece in shown] == ["𓀀"]


def test_broken_bytes_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    first = tokenizer.encode_plain("𓀀")[-4]
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push([first]) for _ in range(50)]
    assert "".join(shown).count("\ufffd") >= 40


def test_space_before_the_first_word(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode_plain("the fox")
    prompt = tokenizer.encode_plain("the")
    assert whole[: len(prompt)] == prompt
    assert "".join(pieces(tokenizer, whole[len(prompt) :], prompt)) == " fox"


def test_special_tokens_can_be_kept(tokenizer: Tokenizer) -> None:
    bos = tokenizer.specials["<s>"].id
    ids = [bos, *tokenizer.encode_plain("fox")]
    assert "".join(pieces(tokenizer, ids)).strip() == "fox"
    assert "".join(pieces(tokenizer, ids, skip=False)).startswith("<s>")
