"""What people put around a question: greetings, thanks, carelessness; and how a story is handed over."""

from __future__ import annotations

import random

from tiny_model.document import sentence

_BEFORE = (
    "please ",
    "hey, ",
    "hello, ",
    "say, ",
    "question: ",
    "can you tell me: ",
    "quick question: ",
    "I have a question: ",
    "one more question: ",
    "and now: ",
    "well, ",
    "so, ",
    "okay, ",
    "hi! ",
)
_AFTER = (" Please.", " Thank you.", " Thanks!", " Be brief.", " I forgot.", " I want to know.", " Please tell me.")

STORY_TRAIN = (
    "{story}\n\n{question}",
    "{story} {question}",
    "Read this story: {story}\n\n{question}",
    "Story: {story}\n\nQuestion: {question}",
    "{story}\n{question}",
    "Here is a text.\n\n{story}\n\n{question}",
    "Listen: {story}\n\n{question}",
)
STORY_HELD_OUT = (
    "Here is a story.\n\n{story}\n\n{question}",
    "Read this: {story}\n\n{question}",
)


def carelessly(rng: random.Random, question: str) -> str:
    """The question as someone might type it: mostly as it is, sometimes with words around it or without its capital."""
    chance = rng.random()
    if chance < 0.15:
        question = rng.choice(_BEFORE) + question
    elif chance < 0.25:
        question = sentence(question) + rng.choice(_AFTER)
    if rng.random() < 0.06 and question[-1] in "?.!":
        question = question[:-1]
    return question if rng.random() < 0.12 else sentence(question)
