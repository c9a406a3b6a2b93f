"""What a service without weights knows of a model: its text side and its defaults, from the model directory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.text.shield import Shield, Specials
from baton.text.template import ChatTemplate, TemplateError
from baton.text.tokenizer import ModelFilesError, Tokenizer

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What generation_config.json says of sampling; a field it leaves out has the value that switches it off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation as the model reads it."""

    text: str
    token_ids: list[int]


class TextModel:
    """Tokenizer, chat template and defaults of one model.

    Args:
        name: what clients call it.
        tokenizer: its tokenizer.
        config: parsed config.json.
        generation: parsed generation_config.json.
        tokenizer_config: parsed tokenizer_config.json.
        template: source of its chat template; None: it has none.

    Attributes:
        text_digest: of everything that turns messages into ids and ids into text.
        max_context: tokens of prompt plus answer at most, by the model's own configuration.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        tokenizer_config: Mapping[str, Any],
        template: str | None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._specials = Specials(tokenizer.specials)
        text_config = config.get("text_config") or config
        self.max_context = _max_context(text_config, tokenizer_config)
        self.vocab_size = int(text_config.get("vocab_size") or tokenizer.vocab_size)
        eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
        self.eos_token_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
        self.defaults = _defaults(generation)
        specials = {key: _token_text(tokenizer_config.get(key)) for key in _SPECIAL_KEYS}
        try:
            self.template = ChatTemplate(template, {k: v for k, v in specials.items() if v}) if template else None
        except TemplateError as error:
            raise ModelFilesError(str(error)) from error
        self.text_digest = hashlib.blake2b(
            json.dumps([tokenizer.digest, template, specials]).encode(), digest_size=16
        ).hexdigest()

    @classmethod
    def load(cls, directory: Path, name: str = "") -> TextModel:
        """Read a model directory; `name` defaults to the directory's.

        Raises:
            ModelFilesError: a file is missing or broken.
        """
        tokenizer_config = _json(directory / "tokenizer_config.json", required=False)
        return cls(
            name or directory.resolve().name,
            Tokenizer.load(directory),
            _json(directory / "config.json", required=True),
            _json(directory / "generation_config.json", required=False),
            tokenizer_config,
            _template(directory, tokenizer_config),
        )

    def render(self, messages: Sequence[tuple[str, str]]) -> RenderedPrompt:
        """A conversation, (role, content) oldest first, through the chat template.

        Special tokens of the template count; ones that users wrote are plain text.

        Raises:
            TemplateError: the model has no chat template, or it refused the conversation.
        """
        if self.template is None:
            raise TemplateError("the model has no chat template")
        shield = Shield(self._specials, [content for _, content in messages])
        rendered = self.template.render(
            [{"role": role, "content": content} for (role, _), content in zip(messages, shield.contents, strict=True)]
        )
        if not shield.active and not self.tokenizer.normalizes_specials:
            return RenderedPrompt(rendered, self.tokenizer.encode_trusted(rendered))
        token_ids: list[int] = []
        for piece, special in shield.pieces(rendered):
            token_ids += [self.tokenizer.specials[piece].id] if special else self.tokenizer.encode_plain(piece)
        return RenderedPrompt(shield.restore(rendered), token_ids)


def _json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if required:
            raise ModelFilesError(f"{path} is missing") from error
        return {}
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read") from error
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is no JSON object")
    return content


def _template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else the tokenizer's configuration, which may name several."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a text, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _max_context(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int:
    for source, keys in ((config, _CONTEXT_KEYS), (tokenizer_config, ("model_max_length",))):
        for key in keys:
            value = source.get(key)
            # Tokenizers without a limit of their own write 1e30.
            if isinstance(value, int | float) and 0 < value < 2**31:
                return int(value)
    raise ModelFilesError(f"config.json names no context length ({', '.join(_CONTEXT_KEYS)})")


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """Values within the API's ranges; one outside switches its field off, as one that is missing does."""
    off = SamplingDefaults()

    def number(key: str, low: float, high: float, default: float) -> float:
        value = generation.get(key)
        usable = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
        return float(value) if usable else default  # type: ignore[arg-type]

    temperature = number("temperature", 0, 2, off.temperature)
    return SamplingDefaults(
        temperature=0.0 if generation.get("do_sample") is False else temperature,
        top_p=number("top_p", 1e-6, 1, off.top_p),
        top_k=int(number("top_k", 0, 2**31, off.top_k)),
        min_p=number("min_p", 0, 1, off.min_p),
        repetition_penalty=number("repetition_penalty", 1e-3, 10, off.repetition_penalty),
    )
