"""Numbers in words, as digits. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_UNITS: Final = {
    word: value
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
        + [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
    )
}
_TENS: Final = {
    word: 10 * value
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_SCALES: Final = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_FIXED: Final = {"dozen": "12", "half": "0.5", "quarter": "0.25", "once": "1x", "twice": "2x", "thrice": "3x"}
_ORDINALS: Final = {
    word: f"#{value}"
    for value, word in enumerate(
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"], 1
    )
}
_DIGITS: Final = re.compile(r"[+-]?\d[\d.,:/-]*")
_ORDINAL_DIGITS: Final = re.compile(r"(\d+)(?:st|nd|rd|th)")
_THOUSANDS: Final = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def is_number(word: str) -> bool:
    """Whether a word, as `digits` returns it, is a number."""
    return word[:1].isdigit() or word[:1] in "#+-"


def digits(words: list[str]) -> Iterator[str]:
    """The words with every number in digits: `twenty-five` is 25, `two hundred` 200, `third` is #3, `1,000` is 1000.

    Args:
        words: lower case; a hyphen only within a word or a number.
    """
    at = 0
    while at < len(words):
        value, after = _spelled(words, at)
        if after > at:
            yield str(value)
            at = after
            continue
        yield _single(words[at])
        at += 1


def _single(word: str) -> str:
    if (ordinal := _ORDINAL_DIGITS.fullmatch(word)) is not None:
        return f"#{ordinal[1]}"
    if _DIGITS.fullmatch(word):
        return _THOUSANDS.sub("", word).rstrip(".,:/-")
    return _FIXED.get(word) or _ORDINALS.get(word) or word


def _spelled(words: list[str], at: int) -> tuple[int, int]:
    """Value of the number in words that begins at a position, and where it ends; there: none."""
    total = current = 0
    began = at
    while at < len(words):
        word = words[at]
        parts = word.split("-")
        if len(parts) == 2 and parts[0] in _TENS and 0 < _UNITS.get(parts[1], 0) < 10:
            current += _TENS[parts[0]] + _UNITS[parts[1]]
        elif word in _TENS and current % 100 == 0:
            current += _TENS[word]
        elif word in _UNITS and _fits(current, _UNITS[word]):
            current += _UNITS[word]
        elif word == "hundred" and 0 < current < 10:
            current *= 100
        elif word in _SCALES and word != "hundred" and current > 0:
            total += current * _SCALES[word]
            current = 0
        elif not (word == "and" and at > began and words[at - 1] in _SCALES and _continues(words, at + 1)):
            break
        at += 1
    return total + current, at


def _fits(current: int, unit: int) -> bool:
    return current % 100 == 0 or (current % 10 == 0 and current % 100 >= 20 and 0 < unit < 10)


def _continues(words: list[str], at: int) -> bool:
    return at < len(words) and (words[at].split("-")[0] in _TENS or words[at] in _UNITS)
