"""What a question says, taken apart: the facts the guard compares. Pure.

A question becomes a kind (how-to, why, who ...), what must be the same to the letter (quoted text, code), and its words
with what stands before each of them, in order. Words that say nothing are left out; they are named in `english.toml`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from baton_cache.semantic.lexicon import HOLES, Lexicon, english
from baton_cache.semantic.numbers import digits, is_number

_PLAIN_QUOTES: Final = str.maketrans("‘’‚‛“”„‟«»–—−", '\'\'\'\'""""""---')
_EXACT: Final = re.compile(
    r"```.*?```|`[^`]*`|\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)"  # code and quotations
    r"|[a-z]+://\S+|\S+@\S+\.\w+"  # addresses
    r"|(?<!\S)\S*(?:[_\\=<>{}()\[\]#*^|~$€£¥]|::|\+\+|&&|\w/\w|\w\.[a-zA-Z]\w)\S*"  # code, paths, sums of money
    r"|(?<!\S)-{1,2}[a-zA-Z][\w-]*|(?<!\S)[/.~]\S*\w"  # flags and paths
    r"|(?<!\S)!\w\S*|\b[a-zA-Z]'(?![\w'])"  # !x, f'
    r"|\b[a-z]+[A-Z]\w*",  # camelCase
    re.DOTALL,
)
_PRIVATE: Final = re.compile(f"[{chr(HOLES.start)}-{chr(HOLES.stop)}]")
_CONTRACTIONS: Final = (
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bcan't\b|\bcannot\b"), "can not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"(?<=\w)'re\b"), " are"),
    (re.compile(r"(?<=\w)'m\b"), " am"),
    (re.compile(r"(?<=\w)'ve\b"), " have"),
    (re.compile(r"(?<=\w)'ll\b"), " will"),
    (re.compile(r"(?<=\w)'d\b"), " would"),
    (re.compile(r"\b(what|how|who|where|when|why|that|there|it|he|she|here)'s\b"), r"\1 is"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(r"\bgonna\b"), "going to"),
    (re.compile(r"\b(?:is|are|am) (?:(.{1,60}?) )?going to(?! the\b)"), r"will \1"),
    (re.compile(r"\bwanna\b"), "want to"),
    (re.compile(r"(?<=s)'(?!\w)|'s\b"), ""),
)
_WORD: Final = re.compile(
    r"(?<![\w])[+-]?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th)?(?![a-z0-9])|[+-]?\d+(?:[.,]\d+)*(?=[a-z])"
    r"|[^\W_]+(?:-[^\W_]+)*|[^\w\s'\"]"
)
_USA: Final = re.compile(r"\bUS\b|\bU\.S\.(A\.)?")
_FRONTED: Final = re.compile(
    r"\A\s*((?:In|On|For|With|Using|At|in|on|for|with|using|at) [^,.?!]{1,60}), ([^?!.]+)", re.DOTALL
)
_NAME: Final = re.compile(r"(?<=[\w,;:)] )([A-Z][\w'-]*|[A-Z]\b)")
_HYPHEN: Final = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_PUNCTUATION: Final = frozenset("?!.;,:")
_NEGATIONS: Final = frozenset({"not", "no", "never", "neither", "nor", "without", "none", "nothing", "nobody"})
_PERSONS: Final = dict.fromkeys(["i", "we", "me", "us", "myself"], "asker") | dict.fromkeys(
    ["you", "yourself"], "asked"
)
_US: Final = frozenset({"me", "us"})
_OWNERS: Final = dict.fromkeys(["my", "mine", "our", "ours"], "asker") | dict.fromkeys(["your", "yours"], "asked")
_PAST: Final = frozenset({"was", "were", "did", "had"})
_PRESENT: Final = frozenset(
    {"is", "are", "am", "do", "does", "has", "have", "be", "been", "being", "can", "should", "will"}
)
_PAST_ENDING: Final = re.compile(r"\w{2,}[^e\W]ed")
_FUTURE: Final = frozenset({"will", "shall"})
_HAVE: Final = frozenset({"have", "has", "had", "having"})
_DO: Final = frozenset({"do", "does", "did", "done", "doing"})
_BE: Final = frozenset({"is", "are", "am", "was", "were", "be", "been", "being"})
_OF_ALL: Final = frozenset({"yes-no", "can", "may", "possible", "why", "who", "when"})
"""Kinds of questions in which *some* and *any* count."""
_SOME: Final = frozenset({"some", "any"})
_ARTICLES: Final = frozenset({"a", "an", "the", "is", "are", "do", "does", "there"})
_RAISED: Final = ("<super>", "<sub>", "<fraction>")
_SUPERLATIVE: Final = re.compile(r"\w{2,}est|most|least|best|worst|last|only|top")


@dataclass(frozen=True, slots=True)
class Item:
    """A word that counts."""

    base: str
    """Without inflection; a hole's text where something must be the same to the letter."""
    word: str
    """As it was asked."""
    marker: str
    """Class of the preposition before it; empty: none."""
    hard: bool
    """Whether that preposition counts."""
    number: bool
    form: str
    """Of a verb: `past`, also as a participle, or `ing`; empty: neither."""
    exact: bool
    """A number, a name, or to the letter: nothing else may stand for it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a question says."""

    kind: str
    items: tuple[Item, ...]
    negations: tuple[str, ...]
    tense: str
    verbs: frozenset[str]
    """Of *be*, *have* and *do* those that say something: what something does is not what it is, or has."""
    some: bool
    """Whether it asks of some or any, not of all."""
    us: bool
    """Whether something is done to the asker: hurts me, and hurts it."""
    persons: tuple[str, ...]
    """Who is spoken of, asker or asked, in turn. Whose things they are counts but in a how-to: *your* is anybody's."""
    superlative: bool


def read(text: str, lexicon: Lexicon | None = None) -> Reading:
    """Take a question apart."""
    lexicon = lexicon or english()
    text = unicodedata.normalize("NFKC", _lowered(text)).translate(_PLAIN_QUOTES)
    text = _PRIVATE.sub(lambda found: f" u{ord(found[0]):x} ", text)
    text = _USA.sub("USA", _FRONTED.sub(r"\2 \1", text))
    names = frozenset(name.lower().removesuffix("'s") for name in _NAME.findall(text) if name not in ("I", "I'm"))
    shouted = frozenset(name.lower() for name in names if name.upper() in text) if not text.isupper() else frozenset()
    exact: dict[str, str] = {}

    def hole(found: re.Match[str]) -> str:
        said = found[0].rstrip(".,;:!?")
        stands = chr(HOLES[len(exact)])
        exact[stands] = said.strip("`\"'") if said[:1] in "`\"'" else said
        return f" {stands} " + found[0][len(said) :]

    plain = _EXACT.sub(hole, text).lower()
    for pattern, to in _CONTRACTIONS:
        plain = pattern.sub(to, plain)
    words = [part for word in digits(_WORD.findall(plain)) for part in _HYPHEN.split(word)]
    negations = tuple(sorted(word for word in words if word in _NEGATIONS))
    words = _letters_apart(words, lexicon)
    bare = [word for word in words if word not in _PUNCTUATION]
    asked = _rewritten(_begun(" ".join(bare), lexicon), lexicon)
    kind, rest = _framed(asked, lexicon)
    said = rest if kind == "how-to" else asked.split()
    return Reading(
        kind=kind,
        items=tuple(_items(rest, names, shouted, exact, lexicon)),
        negations=negations,
        tense=_tense(bare, kind, lexicon),
        verbs=_verbs(said, rest, lexicon),
        some=kind in _OF_ALL
        and any(word in _SOME and before != "there" for before, word in zip(["", *said], said, strict=False)),
        us=kind not in ("how-to", "give")
        and any(word in _US and before != "for" for before, word in zip(["", *rest], rest, strict=False)),
        persons=_in_turn(rest, _PERSONS if kind == "how-to" else _PERSONS | _OWNERS),
        superlative=any(_SUPERLATIVE.fullmatch(word) for word in rest),
    )


def _lowered(text: str) -> str:
    """With `^` before what is raised or lowered: else 4² became 42."""
    return "".join(f"^{one}" if unicodedata.decomposition(one).startswith(_RAISED) else one for one in text)


def _verbs(said: list[str], rest: list[str], lexicon: Lexicon) -> frozenset[str]:
    """Those of be, have and do that are more than a sign of tense."""
    markers = lexicon.hard.keys() | lexicon.soft.keys() | {"if", "when", "while", ""}
    acts = any(word in _DO and after in markers for word, after in zip(rest, [*rest, ""][1:], strict=True))
    present = (("be", not _BE.isdisjoint(said)), ("have", not _HAVE.isdisjoint(said)), ("do", acts))
    return frozenset(verb for verb, there in present if there)


def _letters_apart(words: list[str], lexicon: Lexicon) -> list[str]:
    """Where letters stand for something, `a` may: `is a a part of b`, `vitamin a`. Then it becomes `a_`, no article."""
    letters = any(len(word) == 1 and word.isalpha() and word not in "ai" for word in words)
    closing = lexicon.soft.keys() | lexicon.hard.keys() | _PUNCTUATION | {"or", "is", ""}
    if letters:
        closing |= lexicon.silent

    def letter(before: str, word: str, after: str) -> bool:
        return word == "a" and (before in lexicon.lettered or after in closing or (letters and len(after) == 1))

    return [
        f"{word}_" if letter(before, word, after) else word
        for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False)
    ]


def _begun(asked: str, lexicon: Lexicon) -> str:
    """Without greetings, and `could you tell me`."""
    while True:
        ends = [match.end() for frame in lexicon.leads if (match := frame.pattern.match(asked))]
        if not ends or max(ends) in (0, len(asked)):
            return asked
        asked = asked[max(ends) :]


def _rewritten(asked: str, lexicon: Lexicon) -> str:
    """With turns of phrase that mean the same made one."""
    for pattern, to in lexicon.rewrites:
        asked = re.sub(" +", " ", pattern.sub(to, asked)).strip()
    return asked


def _framed(asked: str, lexicon: Lexicon) -> tuple[str, list[str]]:
    """The kind of a question, and the words after what says it."""
    kind = ""
    while asked and not kind:
        ends = [(match.end(), frame.kind) for frame in lexicon.frames if (match := frame.pattern.match(asked))]
        if not ends:
            break
        end, kind = max(ends, key=lambda found: found[0])
        asked = asked[end:]
    return kind or "what", asked.removesuffix(" please").removesuffix(" thanks").split()


def _items(
    words: list[str], names: frozenset[str], shouted: frozenset[str], exact: dict[str, str], lexicon: Lexicon
) -> list[Item]:
    """The words that count, each with the preposition before it; `x and y`, and a name of two words, share theirs."""
    items: list[Item] = []
    # Where words are spoken of, each counts: hello in French is not thanks in French.
    silent = lexicon.silent if lexicon.mentions.isdisjoint(words) else lexicon.silent & _ARTICLES
    marker = ""
    shared = False
    for at, word in enumerate(words):
        if word in lexicon.hard or word in lexicon.soft:
            marker, shared = lexicon.hard.get(word) or lexicon.soft[word], False
        elif word in ("and", "&"):
            shared = True
        elif word in exact or word in shouted or word not in silent:
            two = at > 0 and word in names and words[at - 1] in names
            if not marker and items and (shared or two):
                marker = next((item.marker for item in reversed(items) if item.marker or not shared), "")
            known = word in shouted and word in lexicon.groups
            sure = word in exact or is_number(word) or (word in names and not known)
            items.append(
                Item(
                    base=exact.get(word) or (word if sure else lexicon.base(word)),
                    word="" if word in exact else word,
                    marker=marker,
                    hard=marker in lexicon.hard.values(),
                    number=is_number(word),
                    form="" if sure else _form(word, lexicon),
                    exact=sure,
                )
            )
            marker, shared = "", False
    return items


def _form(word: str, lexicon: Lexicon) -> str:
    if word in lexicon.participles or _PAST_ENDING.fullmatch(word):
        return "past"
    return "ing" if len(word) > 4 and word.endswith("ing") and lexicon.base(word) != word else ""


def _in_turn(words: list[str], persons: dict[str, str]) -> tuple[str, ...]:
    return tuple(person for person, _ in groupby(persons[word] for word in words if word in persons))


def _tense(words: list[str], kind: str, lexicon: Lexicon) -> str:
    if not _FUTURE.isdisjoint(words) and not {"you"} & set(words):
        return "future"
    if not _PAST.isdisjoint(words):
        return "past"
    if (
        kind not in ("how-to", "give")
        and _PRESENT.isdisjoint(words)
        and any(word in lexicon.pasts or _PAST_ENDING.fullmatch(word) for word in words)
    ):
        return "past"
    return "present"
