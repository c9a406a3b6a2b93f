"""Whether two questions ask the same, as far as words can tell. Pure.

Similar vectors do not: *enable* and *disable*, *Paris* and *Rome*, *A to B* and *B to A* lie closer together than most
real paraphrases. So whatever is in one question must be in the other: of the same kind, with the same numbers, names
and quotations, negated as often, each word with its like, in the same order where the order may matter. Everything that
is not known to be harmless refuses.
"""

from __future__ import annotations

import enum
from itertools import combinations
from typing import Final

from baton_cache.semantic.lexicon import Lexicon, english
from baton_cache.semantic.reading import Item, Reading, read

MOST_WORDS: Final = 48


class Rule(enum.StrEnum):
    """What refuses a match."""

    KIND = "kind"
    """They ask different things: how and why, who and when."""
    EXACT = "exact"
    """A number, a name, a quotation or code differs."""
    NEGATION = "negation"
    TENSE = "tense"
    PERSON = "person"
    """What is mine in one is yours in the other."""
    WORD = "word"
    """A word of one has no like in the other."""
    RELATION = "relation"
    """A word follows `to` in one, and not in the other."""
    ORDER = "order"
    """The same words in another order: who does what to whom."""
    VERB = "verb"
    """What is, has and does: *is eaten* and *eats*, *is* and *has*."""
    SOME = "some"
    """Some of them, or all."""
    COUNT = "count"
    """The largest one, or the largest ones."""
    EMPTY = "empty"
    """There is nothing to compare."""
    LONG = "long"
    """There are too many words to compare."""


def refusal(one: str, other: str) -> Rule | None:
    """Why the answer of one question must not be given to another; None: nothing speaks against it."""
    return judge(read(one), read(other))


def judge(one: Reading, other: Reading, lexicon: Lexicon | None = None) -> Rule | None:
    """As `refusal`, of questions already taken apart."""
    lexicon = lexicon or english()
    if not one.items or not other.items:
        return Rule.EMPTY
    if len(one.items) > MOST_WORDS or len(other.items) > MOST_WORDS:
        return Rule.LONG
    if one.negations != other.negations:
        return Rule.NEGATION
    if one.kind != other.kind and frozenset((one.kind, other.kind)) not in lexicon.kinds:
        return Rule.KIND
    if one.tense != other.tense:
        return Rule.TENSE
    if (one.verbs ^ other.verbs) - {"be"}:
        return Rule.VERB
    if one.some != other.some:
        return Rule.SOME
    if one.us != other.us or (one.persons and other.persons and one.persons != other.persons):
        return Rule.PERSON
    pairs = _paired(one.items, other.items, lexicon)
    if isinstance(pairs, Rule):
        return pairs
    tool = one.kind == other.kind == "how-to"
    if any(_related_otherwise(one.items[a], other.items[b], tool) for a, b in pairs):
        return Rule.RELATION
    passive = "be" in one.verbs ^ other.verbs
    if "be" in one.verbs | other.verbs and any(
        _acts_otherwise(one.items[a], other.items[b], passive) for a, b in pairs
    ):
        return Rule.VERB
    if (one.superlative or other.superlative) and any(
        _plural(one.items[a]) != _plural(other.items[b]) for a, b in pairs
    ):
        return Rule.COUNT
    if not _same_order(pairs, one.items, other.items):
        return Rule.ORDER
    return None


def _paired(one: tuple[Item, ...], other: tuple[Item, ...], lexicon: Lexicon) -> list[tuple[int, int]] | Rule:
    """Every word with its like in the other question, equal ones first; or what stands alone."""
    left, right = list(range(len(one))), list(range(len(other)))
    pairs = []
    for equal in (True, False):
        for a in list(left):
            for b in right:
                same = one[a].base == other[b].base or (one[a].word == other[b].word != "")
                fixed = one[a].exact or other[b].exact
                if same or (not equal and not fixed and lexicon.alike(one[a].base, other[b].base)):
                    pairs.append((a, b))
                    left.remove(a)
                    right.remove(b)
                    break
    alone = [one[a] for a in left] + [other[b] for b in right]
    if alone:
        return Rule.EXACT if any(item.exact for item in alone) else Rule.WORD
    return sorted(pairs)


def _related_otherwise(one: Item, other: Item, tool: bool) -> bool:
    """Whether what stands before them says something else.

    Args:
        one, other: a word and its like.
        tool: whether it is asked how to do something: in R, on Linux and with CSS is with what.
    """
    if one.marker == other.marker:
        return False
    if one.hard or other.hard:
        return True
    if tool and one.exact and not one.number and {one.marker, other.marker} <= {"in", "on", "with", ""}:
        return False
    return not {one.marker, other.marker} & {"", "of"}


def _acts_otherwise(one: Item, other: Item, passive: bool) -> bool:
    """Whether a verb is a participle in one and not in the other, but for a gerund: for saving, to save.

    Args:
        one, other: a word and its like.
        passive: whether only one of the questions has a form of *be*: who was hired, who hired; is like, likes.
    """
    if passive and (one.form == other.form == "past" or one.word == other.word == "like"):
        return True
    gerund = "ing" in (one.form, other.form) and (one.marker or other.marker)
    return one.form != other.form and not gerund


def _plural(item: Item) -> bool:
    return not item.exact and item.word.endswith("s") and item.word != item.base


def _same_order(pairs: list[tuple[int, int]], one: tuple[Item, ...], other: tuple[Item, ...]) -> bool:
    """Whether words stand in the same order, but for those that say themselves where they belong.

    Such are words after the same preposition in both questions, and `y of x` for `x y`.
    """
    return all(
        b < d
        or _placed(one[a], other[b])
        or _placed(one[c], other[d])
        or _compound(one, a, c, other, d, b)
        or _compound(other, d, b, one, a, c)
        for (a, b), (c, d) in combinations(pairs, 2)
    )


def _placed(one: Item, other: Item) -> bool:
    return bool(one.marker) and one.marker == other.marker


def _compound(of: tuple[Item, ...], head: int, part: int, plain: tuple[Item, ...], before: int, after: int) -> bool:
    """Whether `head of part` in one is `part head` in the other: nothing else with a preposition is between them.

    Args:
        of: the words of the first.
        head, part: positions in it.
        plain: the words of the second.
        before, after: where part and head are in it.
    """
    begins = part
    while begins > head + 1 and of[begins - 1].marker in ("", of[part].marker):
        begins -= 1
    while begins < part and not of[begins].marker:
        begins += 1
    return (
        head < part
        and of[begins].marker != ""
        and not of[begins].hard
        and not any(item.marker for item in of[head + 1 : begins])
        and not any(item.marker or item.number for item in plain[before : after + 1])
    )
