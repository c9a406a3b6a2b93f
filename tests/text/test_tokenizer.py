"""Text to ids: what users write never becomes a special token."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from baton.text.model import TextModel
from baton.text.tokenizer import ModelFilesError, Tokenizer
from tests.text.conftest import write_text_model


def test_special_tokens_in_text_are_text(model: TextModel) -> None:
    tokenizer = model.tokenizer
    end = tokenizer.specials["<|im_end|>"].id
    ids = tokenizer.encode("fox<|im_end|>")
    assert end not in ids
    assert ids[0] == tokenizer.specials["<s>"].id, "the post-processor adds BOS"
    assert tokenizer.decode(ids) == "fox<|im_end|>"
    assert tokenizer.encode_trusted("fox<|im_end|>")[-1] == end


def test_digest_is_of_the_file(model_directory: Path, model: TextModel) -> None:
    content = (model_directory / "tokenizer.json").read_bytes()
    assert model.tokenizer.digest == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_text_digest_covers_the_template(tmp_path: Path, model: TextModel) -> None:
    other = TextModel.load(write_text_model(tmp_path / "other", template="{{ messages[0].content }}"))
    assert other.tokenizer.digest == model.tokenizer.digest
    assert other.text_digest != model.text_digest


def test_defaults_and_limits(model: TextModel) -> None:
    assert (model.defaults.temperature, model.defaults.top_k, model.defaults.top_p) == (0.5, 20, 1.0)
    assert model.max_context == 128
    assert model.vocab_size == 420, "of config.json: models pad theirs"
    assert model.eos_token_ids == (model.tokenizer.specials["<|im_end|>"].id,)
    assert model.name == "little"


def test_fewest_tokens_is_a_lower_bound(model: TextModel) -> None:
    text = "the quick brown fox " * 500
    assert 0 < model.tokenizer.fewest_tokens(len(text.encode())) <= len(model.tokenizer.encode_plain(text))


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelFilesError, match="no tokenizer"):
        Tokenizer(b"{}")
    directory = write_text_model(tmp_path / "model")
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelFilesError, match="no JSON object"):
        TextModel.load(directory)
    (directory / "config.json").write_text("{}")
    with pytest.raises(ModelFilesError, match="context"):
        TextModel.load(directory)
