"""An encoder in a thread of its own: so many texts at a time, so long each, and no more.

What it is asked for when it is too busy or too slow is not there: for the cache, a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton_cache.semantic.metrics import EMBED_FAILURES, EMBED_SECONDS

log = logging.getLogger(__name__)

Vector = NDArray[np.float32]


class EncoderUnusable(Exception):
    """The encoder that was named cannot be served. The text says why."""


class NotEmbedded(Exception):
    """The encoder was too busy, too slow, or failed."""


class Embeds(Protocol):
    """What turns a text into a vector."""

    digest: str
    dimension: int

    def embed(self, text: str) -> Vector:
        """The vector of a text, of length 1."""


class Encoder:
    """The one thread an encoder runs in.

    Args:
        embedder: what computes; called in the thread only.
        most: texts that may wait or be computed at a time.
        timeout: seconds one may take, its wait included.
    """

    def __init__(self, embedder: Embeds, most: int, timeout: float) -> None:
        self._embedder = embedder
        self._most = most
        self._timeout = timeout
        self._pending = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._failed = False

    @property
    def digest(self) -> str:
        """Says which encoder it is."""
        return self._embedder.digest

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self._embedder.dimension

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ends the thread with the block; a text it is at is finished, those that wait are not begun."""
        try:
            yield
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    async def embed(self, text: str) -> Vector:
        """The vector of a text.

        Raises:
            NotEmbedded: there is none in time.
        """
        if self._pending >= self._most:
            EMBED_FAILURES.labels("busy").inc()
            raise NotEmbedded("too many texts wait")
        began = time.perf_counter()
        self._pending += 1
        # The thread goes on after a timeout, so the text counts until it is done.
        future = self._thread.submit(self._embedder.embed, text)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _call(loop, self._done))
        try:
            async with asyncio.timeout(self._timeout):
                vector = await asyncio.wrap_future(future)
        except TimeoutError:
            EMBED_FAILURES.labels("timeout").inc()
            raise NotEmbedded("too slow") from None
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError, OSError) as error:
            EMBED_FAILURES.labels("failed").inc()
            if not self._failed:
                # The type alone: the text of an error may quote the question.
                log.warning("the encoder failed: similar questions are misses", extra={"error": type(error).__name__})
            self._failed = True
            raise NotEmbedded("failed") from error
        finally:
            EMBED_SECONDS.observe(time.perf_counter() - began)
        self._failed = False
        return vector

    def _done(self) -> None:
        self._pending -= 1


def _call(loop: asyncio.AbstractEventLoop, what: object) -> None:
    assert callable(what)
    if not loop.is_closed():
        loop.call_soon_threadsafe(what)
