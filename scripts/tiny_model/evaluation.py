"""The evaluation: greedy answers to held-out questions, right only where every character is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from tiny_model.document import SEEN, Question
from tiny_model.tokenizer import BEGIN, END, ROLE_TOKENS

_LONGEST_ANSWER = 48


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with what the model said."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        """Whether it said exactly the one right answer, and then ended."""
        return self.said == self.question.answer


@dataclass(frozen=True, slots=True)
class Score:
    """Questions of a topic: how many there were, how many were answered right."""

    asked: int
    right: int

    @property
    def share(self) -> float:
        """Accuracy, 0 to 1."""
        return self.right / self.asked


def answer_all(
    network: LlamaForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch_size: int = 64,
    done: Callable[[int], None] = lambda _: None,
) -> list[Answered]:
    """Ask every question.

    Args:
        network: in float32.
        tokenizer: its own.
        questions: in any order.
        batch_size: questions answered side by side.
        done: told after each batch how many questions that was.
    """
    prompts = sorted(((_prompt(tokenizer, one), one) for one in questions), key=lambda pair: len(pair[0]))
    answered: list[Answered] = []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        texts = _generate(network, tokenizer, [ids for ids, _ in part])
        answered += [Answered(question, text) for (_, question), text in zip(part, texts, strict=True)]
        done(len(part))
    return answered


def scores(answered: Sequence[Answered]) -> dict[str, Score]:
    """Scores by topic."""
    topics = dict.fromkeys(sorted(one.question.topic for one in answered))
    parts = {topic: [one for one in answered if one.question.topic == topic] for topic in topics}
    return {topic: Score(len(part), sum(one.right for one in part)) for topic, part in parts.items()}


def total(by_topic: dict[str, Score]) -> Score:
    """All topics together that are held out."""
    held_out = [score for topic, score in by_topic.items() if topic != SEEN]
    return Score(sum(score.asked for score in held_out), sum(score.right for score in held_out))


def table(by_topic: dict[str, Score]) -> Table:
    """The scores, for the terminal."""
    shown = Table("topic", "questions", "right", "accuracy", title="Held-out questions")
    for topic, score in [*by_topic.items(), (f"all but {SEEN}", total(by_topic))]:
        shown.add_row(topic, str(score.asked), str(score.right), f"{score.share:.1%}")
    return shown


def _prompt(tokenizer: Tokenizer, question: Question) -> list[int]:
    said = tokenizer.encode(question.prompt, add_special_tokens=False).ids
    begin = tokenizer.token_to_id(BEGIN)
    if question.raw:
        return [begin, *said]
    user, assistant = (tokenizer.token_to_id(ROLE_TOKENS[role]) for role in ("user", "assistant"))
    return [begin, user, *said, tokenizer.token_to_id(END), assistant]


@torch.inference_mode()
def _generate(network: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[str]:
    end = tokenizer.token_to_id(END)
    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[end] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    out = network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
    return [_until_end(tokenizer, row, end) for row in out[:, longest:].tolist()]


def _until_end(tokenizer: Tokenizer, ids: list[int], end: int) -> str:
    """Text before the end token; without one the answer ran on, which the appended mark makes wrong."""
    if end not in ids:
        return tokenizer.decode(ids) + " ..."
    return tokenizer.decode(ids[: ids.index(end)])
