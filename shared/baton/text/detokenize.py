"""Text of a growing answer: incomplete characters are held back until they are whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from baton.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6  # tokens before the answer that decide whether its first piece starts with a space
# A character is at most four bytes, in as many tokens, after pieces that show nothing yet. With more held than this
# the bytes are broken, not incomplete.
_MOST_HELD = 8


class Detokenizer:
    """Turns generated ids into text, piece by piece; the pieces joined are the text of all ids.

    What is out after an id is a function of the ids up to it, not of how they were grouped into pushes.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt; only its end matters, for the space in front of the first word.
        skip_special_tokens: leave special tokens out.
    """

    __slots__ = ("_pieces",)

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._pieces: _Bytes | _Window
        if tokenizer.byte_level:
            self._pieces = _Bytes(tokenizer, skip_special_tokens)
        else:
            self._pieces = _Window(tokenizer, prompt_ids, skip_special_tokens)

    def push(self, token_ids: Iterable[int]) -> str:
        """Add ids; returns the text they complete."""
        return "".join([self._pieces.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The answer is complete: what was held back, broken characters as U+FFFD."""
        return self._pieces.flush()


class _Bytes:
    """Byte-level tokenizers: the text is the tokens' bytes, decoded."""

    __slots__ = ("_skipped", "_tokenizer", "_utf8")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Other tokenizers: the text a few tokens of context and the new ones have, less that of the context.

    This is what `tokenizers.decoders.DecodeStream` does, but it neither raises on text that changes its own past
    (byte fallback) nor holds broken bytes back for ever.
    """

    __slots__ = ("_context", "_held", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        end = [token_id for token_id in prompt_ids[-4 * _CONTEXT :] if token_id not in self._skipped]
        self._context = end[-_CONTEXT:]
        while self._decode(self._context).startswith(_REPLACEMENT):  # cut within a character
            del self._context[0]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        text = self._new_text()
        if (not text or text.endswith(_REPLACEMENT)) and len(self._held) < _MOST_HELD:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        known = self._decode(self._context)
        whole = self._decode(self._context + self._held)
        if whole.startswith(known):
            return whole[len(known) :]
        return self._decode(self._held)

    def _advance(self) -> None:
        # Whole pieces only: a context cut within a character would change with what follows it.
        self._context = self._held
        self._held = []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
