"""What is known about English, read once from `english.toml`."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("english.toml")
HOLES: Final = range(0xE000, 0xF8FF)
"""Characters for private use: each stands for something that must be the same to the letter; `<>` in the file."""
_HOLE: Final = f"[{chr(HOLES.start)}-{chr(HOLES.stop)}]"
_VOWELS: Final = "aeiou"
_BRITISH: Final = re.compile(r"is(?=(e|es|ed|ing)$)")


@dataclass(frozen=True, slots=True)
class Frame:
    """How a question begins, and what kind it is then."""

    kind: str
    """Empty: it says nothing, and the question goes on."""
    pattern: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words and turns of phrase of a language."""

    silent: frozenset[str]
    question_words: frozenset[str]
    soft: dict[str, str]
    """Class of each preposition that may be left out."""
    hard: dict[str, str]
    """Class of each preposition that may not."""
    bases: dict[str, str]
    """Base form of each irregular one."""
    pasts: frozenset[str]
    """Irregular past forms."""
    participles: frozenset[str]
    """Those, and irregular participles."""
    mentions: frozenset[str]
    """Words of questions that are about words."""
    lettered: frozenset[str]
    """Words that a letter follows, no article: vitamin A."""
    frames: tuple[Frame, ...]
    leads: tuple[Frame, ...]
    """Those that say nothing: greetings, and asking to be told."""
    rewrites: tuple[tuple[re.Pattern[str], str], ...]
    kinds: frozenset[frozenset[str]]
    """Pairs of kinds of questions that may stand for each other."""
    groups: dict[str, frozenset[int]]
    """Numbers of the groups of synonyms a base form is in."""

    def base(self, word: str) -> str:
        """A word without its inflection: houses, housing, housed become one."""
        if word in self.bases:
            return self.bases[word]
        return _trimmed(word)

    def alike(self, one: str, other: str) -> bool:
        """Whether two base forms may stand for each other."""
        return one == other or not self.groups.get(one, frozenset()).isdisjoint(self.groups.get(other, frozenset()))


@cache
def english() -> Lexicon:
    """The one there is."""
    read = tomllib.loads(_FILE.read_text())
    bases, pasts, participles = _irregular(read["irregular"]["forms"])
    groups: dict[str, set[int]] = defaultdict(set)
    for number, line in enumerate(read["synonyms"]["groups"].splitlines()):
        for word in line.split():
            groups[bases.get(word, _trimmed(word))].add(number)
    frames = tuple(
        Frame(frame["kind"], re.compile(rf"(?:{pattern.strip()})(?: |$)"))
        for frame in read["frames"]
        for pattern in frame["patterns"]
    )
    return Lexicon(
        silent=frozenset(read["silent"].split()),
        question_words=frozenset(read["question_words"].split()),
        soft=_by_word(read["markers"]["soft"]),
        hard=_by_word(read["markers"]["hard"]),
        bases=bases,
        pasts=pasts,
        participles=participles,
        mentions=frozenset(read["mentions"].split()),
        lettered=frozenset(read["lettered"].split()),
        frames=frames,
        leads=tuple(frame for frame in frames if not frame.kind),
        rewrites=tuple(
            (re.compile(_whole_words(what.replace("<>", _HOLE))), to) for what, to in read["rewrites"].items()
        ),
        kinds=frozenset(frozenset(pair.split()) for pair in read["kinds"]["alike"]),
        groups={word: frozenset(numbers) for word, numbers in groups.items()},
    )


def _whole_words(pattern: str) -> str:
    before = "" if pattern.startswith("^") else r"(?<![^ ])"
    after = "" if pattern.endswith(("$", " ", "(?=[0-9])")) else r"(?![^ ])"
    return f"{before}(?:{pattern}){after}"


def _by_word(classes: dict[str, str]) -> dict[str, str]:
    return {word: name for name, words in classes.items() for word in words.split()}


def _irregular(forms: str) -> tuple[dict[str, str], frozenset[str], frozenset[str]]:
    """Bases by form, past forms, and those with the participles: what else a verb has but in -s and -ing."""
    bases: dict[str, str] = {}
    pasts, participles = set(), set()
    for line in forms.splitlines():
        for entry in line.split("|"):
            base, *others = entry.split() or [""]
            for form in (base, *others):
                bases.setdefault(form.rstrip("*"), base)
            past = {form.rstrip("*") for form in others if form.endswith("*")}
            pasts |= past
            if past:
                participles |= {form.rstrip("*") for form in others if not form.endswith(("s", "ing"))}
    bases.pop("", None)
    return bases, frozenset(pasts), frozenset(participles)


def _trimmed(word: str) -> str:
    """Without -s, -ing and -ed; what is left is the same for all forms, not always a word."""
    if len(word) <= 3 or not word.isalpha():
        return word
    if len(word) > 6:
        word = _BRITISH.sub("iz", word)
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("sses", "shes", "ches", "xes", "zes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and any(letter in _VOWELS + "y" for letter in stem):
            if stem[-1] == stem[-2] and stem[-1] not in "lsz" + _VOWELS:
                stem = stem[:-1]
            word = stem
            break
    if word.endswith("i") and len(word) > 3:
        word = word[:-1] + "y"
    return word.removesuffix("e") if len(word) > 3 else word
