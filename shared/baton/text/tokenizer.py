"""A model's tokenizer: text to ids and back, on the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

TOKENIZER_FILE = "tokenizer.json"


class ModelFilesError(Exception):
    """A model directory lacks a file, or a file in it cannot be used. A service does not start with such a model."""


def file_digest(content: bytes) -> str:
    """Digest by which two services know that they read the same file, hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token with a meaning of its own, for example the end of a turn."""

    id: int
    text: str


class Tokenizer:
    """Tokenizer of one model. Immutable after construction, so any thread may use it.

    Args:
        content: bytes of tokenizer.json.

    Raises:
        ModelFilesError: the bytes are no tokenizer.

    Attributes:
        digest: of tokenizer.json; equal digests give equal token ids.
        specials: special tokens, by text.
        vocab_size: one more than the highest id the tokenizer knows.
        byte_level: whether text is the concatenation of `token_bytes`: byte-level BPE, as in GPT-2, Llama 3 and Qwen.
    """

    def __init__(self, content: bytes) -> None:
        self.digest = file_digest(content)
        self._parsing = _parse(content)
        # The library keeps this switch in the tokenizer itself, hence two of them.
        self._plain = _parse(content)
        self._plain.encode_special_tokens = True
        added = self._parsing.get_added_tokens_decoder()
        self.specials = {
            token.content: SpecialToken(id_, token.content) for id_, token in added.items() if token.special
        }
        self.special_ids = frozenset(token.id for token in self.specials.values())
        vocab = self._parsing.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.byte_level = (json.loads(content).get("decoder") or {}).get("type") == "ByteLevel"
        # A normalizer may turn what users write into a special token that no search for its text finds.
        self.normalizes_specials = _normalizes_specials(json.loads(content))
        self._longest = max((len(piece.encode()) for piece in vocab), default=1)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a model directory.

        Raises:
            ModelFilesError: there is no usable tokenizer.json.
        """
        try:
            return cls((directory / TOKENIZER_FILE).read_bytes())
        except OSError as error:
            raise ModelFilesError(f"{directory / TOKENIZER_FILE} cannot be read: {error.strerror}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a user's text: special tokens in it are plain text; the model's prefix (BOS) is added."""
        return self._plain.encode(text, add_special_tokens=True).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a user's text within a prompt: special tokens are plain text, nothing is added."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_trusted(self, text: str) -> list[int]:
        """Ids of a text the server made: special tokens in it count, nothing is added."""
        return self._parsing.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no valid UTF-8 become U+FFFD; ids without a token are left out."""
        return self._parsing.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def fewest_tokens(self, num_bytes: int) -> int:
        """A lower bound of the number of tokens of a text of so many bytes, for a refusal before any work."""
        # Unicode normalization makes a text at most four times shorter; other tokenizers may drop whole runs of it.
        return num_bytes // (4 * self._longest) if self.byte_level else 0

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes one token stands for; only of byte-level tokenizers. Empty for an id without a token."""
        piece = self._parsing.id_to_token(token_id)
        if piece is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        except KeyError:  # an added token with characters outside of the byte alphabet: it is its own text
            return piece.encode()


def _parse(content: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ModelFilesError(f"{TOKENIZER_FILE} is no tokenizer: {error}") from error
    # Files saved by a trainer may carry its settings; a server must not cut or fill prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _normalizes_specials(file: dict[str, Any]) -> bool:
    added = file.get("added_tokens") or []
    return bool(file.get("normalizer")) and any(token.get("special") and token.get("normalized") for token in added)


def _byte_alphabet() -> dict[str, int]:
    """The byte each character of a byte-level token stands for (GPT-2): printable ones for themselves, others moved."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_alphabet()
