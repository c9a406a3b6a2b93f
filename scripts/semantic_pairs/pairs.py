"""Reads the hand-written questions, and makes labelled pairs of them. Deterministic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

_HERE = Path(__file__).parent
_ALTERNATIVES = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions, and whether an answer to one is an answer to the other."""

    one: str
    other: str
    same: bool
    split: str
    """`calibration` or `held-out`; no intent is in both."""
    source: str
    """`paraphrase`, `near` (another question of the topic), `slot` (another name or number) or `opposite`."""
    group: str
    """What it was made of: pairs of one intent are not independent."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What may be asked in many words."""

    same: tuple[str, ...]
    near: tuple[str, ...]
    slots: tuple[tuple[str, tuple[str, str]], ...]

    def filled(self, line: str, value: int) -> str:
        """A line with the first (0) or the second (1) value of every slot."""
        for name, values in self.slots:
            line = line.replace(f"{{{name}}}", values[value])
        return line


def intents(file: str) -> list[Intent]:
    """All of a file, as written."""
    blocks = (_HERE / file).read_text().split("\n\n")
    return [_intent(block.splitlines()) for block in blocks if block.startswith("= ")]


def all_pairs() -> list[Pair]:
    """Every labelled pair, calibration and held out."""
    made: list[Pair] = []
    for file, split in (("intents.txt", "calibration"), ("held_out.txt", "held-out")):
        for intent in intents(file):
            made += _pairs(intent, split)
    return [*made, *_opposites()]


def write(file: Path, pairs: Iterable[Pair]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs))


def read(file: Path) -> list[Pair]:
    """Pairs of a file; only `one`, `other` and `same` must be there. Without `split` a pair is for calibration."""
    pairs = []
    for number, line in enumerate(file.read_text().splitlines()):
        if line.strip():
            said = json.loads(line)
            pairs.append(
                Pair(
                    str(said["one"]),
                    str(said["other"]),
                    bool(said["same"]),
                    str(said.get("split", "calibration")),
                    str(said.get("source", "paraphrase" if said["same"] else "near")),
                    str(said.get("group", number)),
                )
            )
    return pairs


def _intent(lines: list[str]) -> Intent:
    same, near, slots = [], [], []
    for line in lines:
        if line.startswith("= "):
            same.append(line[2:])
        elif line.startswith("! "):
            near.append(line[2:])
        elif line:
            name, _, values = line.partition(": ")
            first, _, second = values.partition(" | ")
            slots.append((name, (first, second)))
    return Intent(tuple(same), tuple(near), tuple(slots))


def _pairs(intent: Intent, split: str) -> Iterator[Pair]:
    group = intent.same[0]
    same, other = ([intent.filled(line, value) for line in intent.same] for value in (0, 1))
    near = [intent.filled(line, 0) for line in intent.near]
    for one, another in combinations(same, 2):
        yield Pair(one, another, True, split, "paraphrase", group)
    for one, another in [*((a, b) for a in same for b in near), *combinations(near, 2)]:
        yield Pair(one, another, False, split, "near", group)
    if intent.slots:
        for at, one in enumerate(same):
            yield Pair(one, other[at], False, split, "slot", group)
            yield Pair(one, other[(at + 1) % len(other)], False, split, "slot", group)


def _opposites() -> Iterator[Pair]:
    split = ""
    for line in (_HERE / "opposites.txt").read_text().splitlines():
        if line.startswith("# ") and line[2:] in ("calibration", "held out"):
            split = line[2:].replace(" ", "-")
        elif line and not line.startswith("#"):
            one, other = (_ALTERNATIVES.sub(rf"\{value}", line) for value in (1, 2))
            yield Pair(one, other, False, split, "opposite", line)
