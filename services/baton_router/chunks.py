"""The chunks of an answer, as many of them as one message takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from baton.internal.v1 import response_cache_pb2

CachedChunk = response_cache_pb2.CachedChunk

MOST_CHUNKS: Final = 256
MOST_TEXT: Final = 16 * 1024
"""Chunks, and characters, that share a message at most: small enough for every client's limit."""


def weight(chunk: CachedChunk) -> int:
    """Tokens, counting a chunk without any as one: it takes room too."""
    return max(1, len(chunk.token_ids))


def message_from(chunks: Sequence[CachedChunk], start: int) -> Sequence[CachedChunk]:
    """The chunks from `start` on that share a message: at least that one."""
    taken = [chunks[start]]
    characters = len(chunks[start].text)
    for chunk in islice(chunks, start + 1, start + MOST_CHUNKS):
        characters += len(chunk.text)
        if characters > MOST_TEXT:
            break
        taken.append(chunk)
    return taken


def joined(chunks: Sequence[CachedChunk]) -> CachedChunk:
    """One chunk with the tokens and the text of several; it is as old as the last of them."""
    if len(chunks) == 1:
        return chunks[0]
    return CachedChunk(
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        text="".join(chunk.text for chunk in chunks),
        since_start_us=chunks[-1].since_start_us,
    )
