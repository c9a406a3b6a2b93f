"""A small byte-level BPE model directory with a ChatML template, and a SentencePiece-like tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from baton.text.model import TextModel
from baton.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the quick cat",
    "user assistant system tell me about the fox, please: what is it?",
    "<think> hello world </think> naïve café 日本語 🙂🙂 Привет",
] * 20

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level() -> RawTokenizer:
    """As GPT-2, Llama 3 and Qwen: byte-level BPE, with a BOS added by the post-processor."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def byte_fallback() -> RawTokenizer:
    """As Llama 2: "▁" for spaces, bytes for characters outside of the vocabulary."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyz.,!?":
        vocab[char] = len(vocab)
    tokenizer = RawTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_text_model(directory: Path, *, context: int = 128, template: str | None = CHATML) -> Path:
    """A model directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"max_position_embeddings": context, "vocab_size": 420}
    generation = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 20,
        "eos_token_id": [tokenizer.token_to_id("<|im_end|>")],
    }
    tokenizer_config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer_config),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("models") / "little")


@pytest.fixture(scope="session")
def model(model_directory: Path) -> TextModel:
    return TextModel.load(model_directory)


@pytest.fixture(scope="session", params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    raw = byte_level() if request.param == "byte level" else byte_fallback()
    return Tokenizer(raw.to_str().encode())
