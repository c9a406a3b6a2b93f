"""The secret that services of one mesh know, and operators' one: where it comes from, and whether one sent is it."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from baton.rpc.cannot_start import CannotStart
from baton.rpc.reloaded import Reloaded, UnusableFile, read_text, reason

MESH_HEADER: Final = "x-baton-mesh-token"
"""Name of the metadata by which a service shows that it belongs to the mesh."""

_USABLE: Final = re.compile(r"[!-~]{32,1024}")
_RULE: Final = "must be 32 to 1024 visible ASCII characters, for example from `openssl rand -hex 32`"

Tokens = tuple[str, ...]
"""The first is sent, all are taken: while one is replaced there are two."""


def token_source(flag: str, given: str, path: Path | None) -> Callable[[], Tokens] | None:
    """Where to get tokens; None: none were given.

    Args:
        flag: name of the setting.
        given: the token itself, from the environment; empty: none.
        path: file with tokens, one a line; read again when it changes.

    Raises:
        CannotStart: both are given, or what is given cannot be used.
    """
    if given and path is not None:
        raise CannotStart(f"--{flag}, --{flag}-file: only one may give a token")
    try:
        if path is not None:
            return Reloaded(f"--{flag}-file", (path,), lambda: _parse(read_text(path))).get
        if not given:
            return None
        tokens = _parse(given)
    except (OSError, UnusableFile) as error:
        raise CannotStart(f"--{flag}{'-file' if path else ''}: {reason(error)}") from None
    return lambda: tokens


def _parse(text: str) -> Tokens:
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not tokens:
        raise UnusableFile("is empty")
    if not all(_USABLE.fullmatch(token) for token in tokens):
        raise UnusableFile(f"a token {_RULE}")
    return tokens


def is_one_of(sent: str, tokens: Tokens) -> bool:
    """Whether a token is among these, in a time that says nothing of how nearly it is."""
    found = False
    for token in tokens:
        found |= hmac.compare_digest(sent.encode(), token.encode())
    return found
