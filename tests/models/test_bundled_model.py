"""The bundled model: small, without code, and it really answers."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from baton.models import bundled_model
from baton.text.model import TextModel

_SCRIPTS = str(Path(__file__).parents[2] / "scripts")
if _SCRIPTS not in sys.path:
    sys.path.insert(0, _SCRIPTS)

from tiny_model import corpus, phrasings, smalltalk, stories, tasks, tokenizer  # noqa: E402

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
HELD_OUT = [
    ("Which city is France's capital city?", "The capital of France is Paris."),
    ("What country is Tokyo in?", "Tokyo is the capital of Japan."),
    ("Which colour does a banana have?", "A banana is yellow."),
    ("What would be the opposite of hot?", "The opposite of hot is cold."),
    ("Give me the plural form of mouse.", "The plural of mouse is mice."),
    ("Which noise does a cow make?", "A cow says moo."),
    ("Do you know which day comes after Monday?", "The day after Monday is Tuesday."),
    ("How much is 7 + 5?", "7 plus 5 is 12."),
    ("Please count from 3 up to 9.", "3, 4, 5, 6, 7, 8, 9."),
    ("Repeat this: river candle eagle", "river candle eagle"),
    (
        "Here is a story.\n\nAnna has a red ball. Ben went to the garden. Ben has a blue kite.\n\n"
        "Tell me who has the kite.",
        "Ben has the kite.",
    ),
]
RAW = [("The capital of France is", " Paris."), ("The opposite of hot is", " cold."), ("A cow says", " moo.")]


@pytest.fixture(scope="module")
def directory() -> Path:
    return bundled_model()


@pytest.fixture(scope="module")
def model(directory: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def words(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def _go_on(model: LlamaForCausalLM, words: PreTrainedTokenizerBase, ids: list[int]) -> str:
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=40)
    return words.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_a_directory_of_plain_files_with_little_in_it(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == FILES
    assert (directory / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((directory / "config.json").read_bytes())
    assert config["model_type"] == "llama"
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert "auto_map" not in config


def test_two_to_four_million_parameters_that_are_all_finite(directory: Path) -> None:
    with safe_open(directory / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 not a dict
    assert 2_000_000 <= sum(weight.numel() for weight in weights) <= 4_000_000
    assert all(weight.isfinite().all() for weight in weights)


def test_its_tokenizer_reads_any_text_and_gives_it_back(directory: Path) -> None:
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert plain.get_vocab_size() == json.loads((directory / "config.json").read_bytes())["vocab_size"]
    for text in ("The capital of France is Paris.", " 12 + 7\n\n\t=", "naïve café 日本語 🙂", "a\u0000b\r\n"):
        assert plain.decode(plain.encode(text).ids) == text


def test_chat_template_renders_alike_in_transformers_and_in_the_mesh(
    directory: Path, words: PreTrainedTokenizerBase
) -> None:
    turns = [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi."), ("user", " What is 1 + 2? ")]
    expected = (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>Hi.<|end|>"
        "<|user|>What is 1 + 2?<|end|><|assistant|>"
    )
    messages = [{"role": role, "content": content} for role, content in turns]
    assert words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ours = TextModel.load(directory)
    rendered = ours.render(turns)
    assert rendered.text == expected
    assert words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == rendered.token_ids
    assert ours.eos_token_ids == (words.eos_token_id,)
    assert ours.defaults.temperature == 0.0


@pytest.mark.parametrize(("asked", "answer"), HELD_OUT)
def test_it_answers_questions_it_has_never_seen(
    model: LlamaForCausalLM, words: PreTrainedTokenizerBase, asked: str, answer: str
) -> None:
    ids = words.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)["input_ids"]
    assert _go_on(model, words, ids) == answer


@pytest.mark.parametrize(("start", "rest"), RAW)
def test_it_goes_on_with_a_plain_text(
    model: LlamaForCausalLM, words: PreTrainedTokenizerBase, start: str, rest: str
) -> None:
    assert _go_on(model, words, words(start)["input_ids"]) == rest


def test_corpus_is_the_same_for_the_same_seed() -> None:
    assert list(islice(corpus.documents(7), 300)) == list(islice(corpus.documents(7), 300))
    assert list(islice(corpus.documents(7), 300)) != list(islice(corpus.documents(8), 300))
    assert corpus.questions(7) == corpus.questions(7)


def test_tokenizer_is_the_same_for_the_same_seed() -> None:
    assert tokenizer.train_tokenizer(3, 200).to_str() == tokenizer.train_tokenizer(3, 200).to_str()


def test_no_held_out_phrasing_is_trained_on() -> None:
    for topic in (*phrasings.TOPICS, *tasks.TASKS, *smalltalk.INTENTS):
        assert not {_bare(text) for text in topic.train} & {_bare(text) for text in topic.held_out}
    for kind in (stories.WHO_HAS, stories.WHAT_HAS, stories.COLOUR_OF, stories.WHERE_IS, stories.EATS, stories.PET_OF):
        assert not set(kind.train) & set(kind.held_out)
    trained = {_bare(turn.text) for document in islice(corpus.documents(0), 20_000) for turn in document.turns}
    assert not trained & {_bare(question.prompt) for question in corpus.questions(0, 20) if not question.raw}


def _bare(text: str) -> str:
    """The text without what does not make it another question: case and punctuation."""
    return " ".join("".join(char if char.isalnum() else " " for char in text.lower()).split())


def test_its_card_states_an_accuracy_of_at_least_95_percent(directory: Path) -> None:
    card = (directory / "README.md").read_text(encoding="utf-8")
    stated = float(card.split("**")[1].split("%")[0])
    assert stated >= 95.0
