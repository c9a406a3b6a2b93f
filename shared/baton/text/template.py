"""Chat templates: Jinja from the server's own model directory, rendered in a sandbox with bounds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]
"""A turn as templates see it: role and content."""

_TICK = "__baton_tick"
_MAX_WIDTH = 1000
_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)")  # of a printf conversion, when it is large or an argument
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})


class TemplateError(Exception):
    """The template refused the conversation, or could not render it. The text is fit for the client."""


class ChatTemplate:
    """A compiled chat template.

    Templates come with the model, from whoever runs the server; the sandbox keeps them away from the process, and the
    bounds keep a careless one from taking the router down: output by `max_chars`, time by `max_seconds`, looked at in
    every loop body, every macro and every piece of output, and no operation that makes a large text out of a small one.

    Args:
        source: Jinja text, as `chat_template` of tokenizer_config.json or chat_template.jinja have it.
        special_tokens: variables such as bos_token and eos_token.
        max_chars: longest rendered text.
        max_seconds: longest rendering.

    Raises:
        TemplateError: the source is no template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        max_chars: int = 4_000_000,
        max_seconds: float = 0.5,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._max_chars = max_chars
        self._max_seconds = max_seconds
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text, with the header of the assistant's turn at its end.

        Raises:
            TemplateError: the template refused the messages (its words), failed, or passed a bound.
        """
        tick = self._clock()
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            _TICK: tick,
        }
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(variables):
                tick()
                length += len(piece)
                if length > self._max_chars:
                    raise TemplateError("the chat template's output is too long")
                pieces.append(piece)
        except _Refused as error:
            raise TemplateError(str(error)) from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError) as error:
            raise TemplateError("the model's chat template cannot render this conversation") from error
        except (TypeError, ValueError) as error:
            raise TemplateError("the model's chat template cannot render this conversation") from error
        return "".join(pieces)

    def _clock(self) -> Callable[[], str]:
        end = time.monotonic() + self._max_seconds

        def tick() -> str:
            if time.monotonic() > end:
                raise TemplateError("the chat template takes too long")
            return ""

        return tick


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 Jinja's own form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a clock check at the head of every loop body and macro, and no multiplied strings."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for block in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(block, nodes.For | nodes.Macro | nodes.CallBlock)
            block.body.insert(0, _tick_node(block.lineno))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _PADDING) and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _small(operator, left, right):
            raise jinja2.TemplateRuntimeError(f"{operator} is not allowed on these values")
        return super().call_binop(context, operator, left, right)


def _small(operator: str, left: Any, right: Any) -> bool:
    """Whether the result is small: arithmetic on numbers, and a short text repeated."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        return operator != "**" or (abs(left) <= 1000 and abs(right) <= 64)
    if operator == "%" and isinstance(left, str):
        return _WIDTH.search(left) is None
    return operator == "*" and isinstance(left, str) and isinstance(right, int) and len(left) * right <= 10_000


def _tick_node(line: int) -> nodes.Node:
    call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
    node = nodes.ExprStmt(call)
    node.set_lineno(line)
    return node


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], autoescape=False
    )
    environment.filters["tojson"] = _tojson
    for name in ("center", "indent"):
        environment.filters[name] = _narrow(environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _narrow(pad: Callable[..., str]) -> Callable[..., str]:
    """A filter that pads, up to a sane width."""

    def narrow(value: Any, width: int | str = 4, *arguments: Any, **named: Any) -> str:
        if (width if isinstance(width, int) else len(width)) > _MAX_WIDTH:
            raise jinja2.TemplateRuntimeError("too wide")
        return pad(value, width, *arguments, **named)

    return narrow


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message)[:500])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
