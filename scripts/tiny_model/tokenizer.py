"""The tiny model's tokenizer: byte-level BPE learned from the corpus, with a chat template."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny_model import corpus, facts
from tiny_model.document import Document

VOCABULARY = 2048
CONTEXT = 2048
BEGIN, END = "<|begin|>", "<|end|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (END, BEGIN, *ROLE_TOKENS.values())

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int, num_documents: int = 20_000) -> Tokenizer:
    """Learn the vocabulary from the beginning of the corpus. Every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_documents), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return tokenizer


def _texts(seed: int, num_documents: int) -> list[str]:
    """Text of the documents, and every table's words often enough to be tokens of their own."""
    texts = [" ".join(facts.WORDS), " ".join(facts.NAMES)] * 50
    for document in itertools.islice(corpus.documents(seed), num_documents):
        texts += [turn.text for turn in document.turns] or [document.text]
    return texts


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    """Token ids of a document, as the chat template gives them, and which of them the model is to learn.

    Learned are the assistant's turns with their end, and the whole of a plain text.
    """
    ids, learned = [tokenizer.token_to_id(BEGIN)], [False]
    end = tokenizer.token_to_id(END)
    for turn in document.turns:
        said = [*tokenizer.encode(turn.text, add_special_tokens=False).ids, end]
        ids += [tokenizer.token_to_id(ROLE_TOKENS[turn.role]), *said]
        learned += [False] + [turn.role == "assistant"] * len(said)
    if document.text:
        said = [*tokenizer.encode(document.text, add_special_tokens=False).ids, end]
        ids += said
        learned += [True] * len(said)
    return ids, learned
