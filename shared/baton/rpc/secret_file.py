"""A secret in a file."""

from __future__ import annotations

from pathlib import Path

from baton.rpc.cannot_start import CannotStart
from baton.rpc.reloaded import UnusableFile, read_text, reason


def read_secret(path: Path, flag: str) -> str:
    """The text of a file, without the space around it.

    Raises:
        CannotStart: it cannot be read, or is empty.
    """
    try:
        secret = read_text(path).strip()
    except (OSError, UnusableFile) as error:
        raise CannotStart(f"{flag}: cannot be read: {reason(error)}") from None
    if not secret:
        raise CannotStart(f"{flag}: is empty")
    return secret
