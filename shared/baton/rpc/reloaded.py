"""Files that are read again when they change: certificates, keys, secrets.

If something is wrong with a new one, that is told, and the one before stays in use.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
"""A file is looked at no more often than this."""

ValueT = TypeVar("ValueT")


class UnusableFile(Exception):
    """What a file holds is not what it should. The message never repeats what it holds."""


class Reloaded(Generic[ValueT]):
    """A value read from files, and read again when one of them is another file than it was, or was written.

    A reader may be any thread: gRPC asks for certificates from threads of its own.

    Args:
        what: for the log, for example "--api-keys".
        paths: files that it depends on.
        load: reads them. Raises OSError or UnusableFile, without their content in the message.
        now: clock, seconds.

    Raises:
        OSError, UnusableFile: they cannot be read, or used, at the start.
    """

    def __init__(
        self,
        what: str,
        paths: tuple[Path, ...],
        load: Callable[[], ValueT],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._paths = paths
        self._load = load
        self._now = now
        self._lock = threading.Lock()
        self._looked = now()
        self._stamp = self._stamps()
        self._value = load()
        self.version = 0
        """Counts the values there were."""

    def get(self) -> ValueT:
        """The value as of a second ago at most."""
        if self._now() - self._looked < LOOK_SECONDS:
            return self._value
        with self._lock:
            if self._now() - self._looked >= LOOK_SECONDS:
                self._looked = self._now()
                self._look()
        return self._value

    def _look(self) -> None:
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        try:
            value = self._load()
            if self._stamps() != stamp:
                return  # written while it was read: the next look has all of it
        except (OSError, UnusableFile) as error:
            log.error("%s: cannot be used, the one before stays: %s", self._what, reason(error))
        else:
            self._value = value
            self.version += 1
            log.info("%s: read again", self._what)
        self._stamp = stamp

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def reason(error: OSError | UnusableFile) -> str:
    """What is wrong, in words that repeat nothing of a file."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError, UnusableFile: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UnusableFile("is not UTF-8 text") from None
