"""The bounded buffer between what a worker produces and what a client reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from baton.rpc.errors import SlowReader
from baton.v1 import inference_pb2


class Unsent:
    """Chunks that wait for the client to read.

    Iterating ends with the source, and raises what the source raised once all chunks before are through.

    Args:
        limit: tokens that may wait. With more, the source is closed at once, which frees the worker, and the reader
            gets SlowReader after the chunk it is on.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[inference_pb2.TokenChunk] = deque()
        self._tokens = 0
        self._more = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None

    async def __aiter__(self) -> AsyncIterator[inference_pb2.TokenChunk]:
        while True:
            while self._chunks and not isinstance(self._error, SlowReader):
                chunk = self._chunks.popleft()
                self._tokens -= _weight(chunk)
                yield chunk
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            self._more.clear()
            await self._more.wait()

    async def fill(self, source: AsyncGenerator[inference_pb2.TokenChunk, None]) -> None:
        """Read the source to its end, into the buffer."""
        try:
            async with aclosing(source):
                async for chunk in source:
                    self._chunks.append(chunk)
                    self._tokens += _weight(chunk)
                    self._more.set()
                    if self._tokens > self._limit:
                        raise SlowReader(f"the client does not read: {self._tokens} tokens wait for it")
        except Exception as error:  # noqa: BLE001 handed to the reader, which raises it
            self._error = error
        finally:
            self._ended = True
            self._more.set()


@asynccontextmanager
async def buffered(source: AsyncGenerator[inference_pb2.TokenChunk, None], limit: int) -> AsyncIterator[Unsent]:
    """Read `source` in a task of its own, which lives as long as the block, into a bounded buffer."""
    unsent = Unsent(limit)
    task = asyncio.create_task(unsent.fill(source))
    try:
        yield unsent
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _weight(chunk: inference_pb2.TokenChunk) -> int:
    """Tokens, counting a chunk without any as one: it takes room too."""
    return max(1, len(chunk.token_ids))
