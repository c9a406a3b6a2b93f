"""The corpus: an endless, seeded stream of documents, and the questions of the evaluation.

Everything in it is made from the tables and phrasings of this package, so it is free of anybody's licence, and the same
seed gives the same stream on every machine.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from tiny_model import drills, phrasings, smalltalk, stories, tasks
from tiny_model.document import SEEN, Document, Question, Turn, sentence
from tiny_model.frames import STORY_HELD_OUT, STORY_TRAIN, carelessly

_TOPIC_WEIGHTS = {"days and months": 1.0, "opposites": 1.5, "countries": 1.2, "capitals": 1.2, "smalltalk": 1.2}
_TASK_WEIGHTS = {"sums": 1.8, "differences": 1.3, "counting": 1.0, "repeating": 2.5}
_TEXT_WEIGHT = 1.5
_SHORT_STORY_WEIGHT = 7.0
_LONG_STORY_WEIGHT = 1.4
# Shares of drills among the first documents, and later.
_DRILLS_EARLY = 0.6
_DRILLS_LATE = 0.06

Exchange = tuple[Turn, Turn]
_Fact = phrasings.Topic | tasks.Task


def documents(seed: int, early: int = 6_000) -> Iterator[Document]:
    """The training stream; it never ends, and never holds a held-out phrasing.

    Args:
        seed: of everything drawn.
        early: documents at the beginning of which most are drills.
    """
    rng = random.Random(seed)
    makers, weights = zip(*_makers(), strict=True)
    for number in itertools.count():
        drilled = rng.random() < (_DRILLS_EARLY if number < early else _DRILLS_LATE)
        yield drills.drill(rng) if drilled else rng.choices(makers, weights)[0](rng)


def questions(seed: int, drawn: int = 120) -> list[Question]:
    """The evaluation: every fact in every held-out phrasing, and `drawn` questions of what is drawn by chance.

    Args:
        seed: of the draws.
        drawn: questions for each task, and each length of story.
    """
    rng = random.Random(f"evaluation {seed}")
    found = [
        _held_out(topic, row, phrasing)
        for topic in phrasings.TOPICS
        for row in topic.rows
        for phrasing in topic.held_out
    ]
    found += [
        Question("smalltalk", prompt, intent.answer) for intent in smalltalk.INTENTS for prompt in intent.held_out
    ]
    for task in tasks.TASKS:
        found += [_held_out(task, task.draw(rng), task.held_out[i % len(task.held_out)]) for i in range(drawn)]
    for name, tell in (("short stories", stories.short_story), ("long stories", stories.long_story)):
        for _ in range(drawn):
            story = tell(rng)
            asked, answer = rng.choice(story.known).ask(rng, held_out=True)
            frame = rng.choice(STORY_HELD_OUT)
            found.append(Question(name, frame.format(story=story.text, question=sentence(asked)), answer))
    for topic in phrasings.TOPICS:
        for row in topic.rows:
            start, rest = _statement(topic.statement, row).split("|")
            found.append(Question(SEEN, start, rest, raw=True))
    return found


def _held_out(topic: _Fact, row: tuple[str, ...], phrasing: str) -> Question:
    return Question(topic.name, sentence(phrasing.format(*row)), _answer(topic, row))


def _answer(topic: _Fact, row: tuple[str, ...]) -> str:
    answer = topic.answer.format(*row)
    return answer if topic is tasks.REPEATING else sentence(answer)


def _makers() -> list[tuple[Callable[[random.Random], Document], float]]:
    """What the stream is mixed from, with weights."""
    makers: list[tuple[Callable[[random.Random], Document], float]] = []
    for topic in phrasings.TOPICS:
        makers.append(
            (_chats(topic.name, lambda rng, topic=topic: _recall(rng, topic)), _TOPIC_WEIGHTS.get(topic.name, 0.8))
        )
    for task in tasks.TASKS:
        makers.append((_chats(task.name, lambda rng, task=task: _work_out(rng, task)), _TASK_WEIGHTS[task.name]))
    makers.append((_chats("smalltalk", _small_talk), _TOPIC_WEIGHTS["smalltalk"]))
    makers.append((_text, _TEXT_WEIGHT))
    makers.append((_short_story, _SHORT_STORY_WEIGHT))
    makers.append((_long_story, _LONG_STORY_WEIGHT))
    return makers


def _chats(name: str, first: Callable[[random.Random], Exchange]) -> Callable[[random.Random], Document]:
    """Conversations that begin with an exchange of one topic; some go on with others, some have a system prompt."""

    def make(rng: random.Random) -> Document:
        turns = [*_system(rng), *first(rng)]
        while rng.random() < 0.25:
            turns += _any_exchange(rng)
        return Document(name, turns=tuple(turns))

    return make


def _system(rng: random.Random) -> tuple[Turn, ...]:
    return (Turn("system", rng.choice(smalltalk.SYSTEM_PROMPTS)),) if rng.random() < 0.12 else ()


def _any_exchange(rng: random.Random) -> Exchange:
    chance = rng.random()
    if chance < 0.6:
        return _recall(rng, rng.choice(phrasings.TOPICS))
    if chance < 0.9:
        return _work_out(rng, rng.choice(tasks.TASKS))
    return _small_talk(rng)


def _exchange(asked: str, answer: str) -> Exchange:
    return Turn("user", asked), Turn("assistant", answer)


def _recall(rng: random.Random, topic: phrasings.Topic) -> Exchange:
    row = rng.choice(topic.rows)
    return _exchange(carelessly(rng, rng.choice(topic.train).format(*row)), _answer(topic, row))


def _work_out(rng: random.Random, task: tasks.Task) -> Exchange:
    row = task.draw(rng)
    asked = rng.choice(task.train).format(*row)
    # What is to be repeated stays as it is.
    asked = sentence(asked) if task is tasks.REPEATING else carelessly(rng, asked)
    return _exchange(asked, _answer(task, row))


def _small_talk(rng: random.Random) -> Exchange:
    intent = rng.choice(smalltalk.INTENTS)
    return _exchange(carelessly(rng, rng.choice(intent.train)), intent.answer)


def _short_story(rng: random.Random) -> Document:
    return _story_chat(rng, "short stories", stories.short_story(rng))


def _long_story(rng: random.Random) -> Document:
    return _story_chat(rng, "long stories", stories.long_story(rng))


def _story_chat(rng: random.Random, name: str, story: stories.Story) -> Document:
    """A story, a question with it, and more questions in later turns."""
    turns = [*_system(rng)]
    known = rng.sample(story.known, rng.randint(1, len(story.known)))
    for i, one in enumerate(known):
        asked, answer = one.ask(rng, held_out=False)
        if i == 0:
            asked = rng.choice(STORY_TRAIN).format(story=story.text, question=sentence(asked))
        turns += _exchange(sentence(asked), answer)
    return Document(name, turns=tuple(turns))


def _text(rng: random.Random) -> Document:
    """Plain text: a statement, or a story without questions."""
    if rng.random() < 0.1:
        return Document(SEEN, text=stories.short_story(rng).text)
    topic = rng.choice((*phrasings.TOPICS, *phrasings.TOPICS, tasks.SUMS, tasks.DIFFERENCES, tasks.COUNTING))
    row = topic.draw(rng) if isinstance(topic, tasks.Task) else rng.choice(topic.rows)
    return Document(SEEN, text=_statement(topic.statement, row).replace("|", ""))


def _statement(form: str, row: tuple[str, ...]) -> str:
    return sentence(form.format(*row))
