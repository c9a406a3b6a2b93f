"""Keeps special tokens in what users write from becoming special tokens in a rendered chat template.

A chat prompt is one text in which the template's special tokens count and the users' must not. Escaping is impossible
(tokenizers know no escape), refusing would forbid talking about special tokens, and rendering with placeholders would
break templates that look at the content (trim, split, startswith). So the users' text is rendered as it is, except
where a special token would arise: there one character is swapped for a private one that no message contains. The
template cannot tell the difference, the tokenizer sees no special token, and the original character is put back in the
pieces between the template's own special tokens, which are encoded as plain text.

Covered: special tokens inside one content, and ones that would arise where a content meets its neighbour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_PRIVATE = range(0xF0000, 0xFFFFE)


class Specials:
    """The texts of a tokenizer's special tokens, prepared for searching. None of them empty."""

    __slots__ = ("_heads", "_inner", "_longest", "_tails", "pattern")

    def __init__(self, texts: Iterable[str]) -> None:
        # The longest first: where several start, tokenizers take the longest. One group, so that `split` keeps them.
        ordered = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, ordered))})" if ordered else r"((?!))")
        self._heads = {text[:cut] for text in ordered for cut in range(1, len(text))}
        self._tails = {text[cut:] for text in ordered for cut in range(1, len(text))}
        self._inner = "\0".join(ordered)
        self._longest = len(ordered[0]) if ordered else 0

    def joins_left(self, core: str) -> bool:
        """Whether text before `core` and a beginning of it, or all of it with more after, could be a special token."""
        if len(core) < self._longest and core in self._inner:
            return True
        return any(core[:length] in self._tails for length in range(1, min(len(core), self._longest) + 1))

    def joins_right(self, core: str) -> bool:
        """Whether an end of `core` and text after it could be a special token."""
        return any(core[-length:] in self._heads for length in range(1, min(len(core), self._longest) + 1))


class Shield:
    """Swaps characters of contents so that no special token can arise from them.

    Args:
        specials: the tokenizer's special tokens.
        contents: everything users wrote.

    Attributes:
        contents: the same with dangerous characters swapped.
        active: whether anything was swapped; if not, the contents hold nothing dangerous.
    """

    def __init__(self, specials: Specials, contents: Sequence[str]) -> None:
        self._specials = specials
        self._original = contents
        self._private: dict[str, str] = {}
        self._free: Iterator[str] | None = None
        self.contents = [self._cover(content) for content in contents]
        self.active = bool(self._private)

    def pieces(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The rendered text cut at its special tokens, originals restored: (text, whether it is a special token)."""
        for i, piece in enumerate(self._specials.pattern.split(rendered)):
            if piece:
                yield (piece, True) if i % 2 else (self.restore(piece), False)

    def restore(self, rendered: str) -> str:
        """The rendered text as it would be without the shield."""
        for char, private in self._private.items():
            rendered = rendered.replace(private, char)
        return rendered

    def _cover(self, content: str) -> str:
        # Again where two overlapped: the second one is whole once the first is not.
        while self._specials.pattern.search(content):
            content = self._specials.pattern.sub(lambda found: self._swap(found[0], 0), content)
        core = content.strip()
        first = len(content) - len(content.lstrip())
        if core and self._specials.joins_left(core):
            content = self._swap(content, first)
        if core and self._specials.joins_right(core):
            content = self._swap(content, first + len(core) - 1)
        return content

    def _swap(self, text: str, at: int) -> str:
        char = text[at]
        if char in self._private.values():
            return text
        if char not in self._private:
            self._private[char] = self._unused()
        return text[:at] + self._private[char] + text[at + 1 :]

    def _unused(self) -> str:
        """A private character that is in no content."""
        if self._free is None:
            taken = set().union(*self._original)
            self._free = (char for char in map(chr, _PRIVATE) if char not in taken)
        return next(self._free)
