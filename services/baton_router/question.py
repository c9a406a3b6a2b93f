"""The part of a prompt that may be worded differently, for a search among similar questions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import InvalidArgument
from baton_router.validate import Prompt, Turn

_FIELD: Final = "cache_control.semantic"
_PERSON: Final = b"baton-context-v1"


def question_of(prompt: Prompt) -> response_cache_pb2.SemanticQuestion:
    """The last message of the user, or a whole text; all the rest goes into the context.

    Raises:
        InvalidArgument: the prompt has no words, or no message of a user.
    """
    if isinstance(prompt, str):
        return response_cache_pb2.SemanticQuestion(text=prompt, context=_context(["text"]))
    turns = [turn for turn in prompt if isinstance(turn, Turn)]
    if not turns:
        raise InvalidArgument(_FIELD, "needs a prompt in words, not token ids")
    asked = next((at for at in reversed(range(len(turns))) if turns[at].role == "user"), None)
    if asked is None:
        raise InvalidArgument(_FIELD, "needs a message of the user")
    rest = ["chat", str(asked)]
    for at, turn in enumerate(turns):
        rest += [turn.role, "" if at == asked else turn.text]
    return response_cache_pb2.SemanticQuestion(text=turns[asked].text, context=_context(rest))


def _context(parts: Iterable[str]) -> bytes:
    """32 bytes that differ whenever a part does, wherever one ends and the next begins."""
    state = blake2b(digest_size=32, person=_PERSON)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()
