"""Chunks share messages: nothing is lost, doubled or moved, and no message grows without bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton_router.chunks import MOST_CHUNKS, MOST_TEXT, CachedChunk, joined, message_from, weight

CHUNKS = st.lists(
    st.builds(
        CachedChunk,
        token_ids=st.lists(st.integers(0, 1000), max_size=4),
        text=st.one_of(st.text("the 🙂", max_size=5), st.just("x" * (MOST_TEXT // 2)), st.just("x" * (2 * MOST_TEXT))),
        since_start_us=st.integers(0, 10**9),
    ),
    min_size=1,
    max_size=20,
)


@given(chunks=CHUNKS, start=st.integers(0, 19))
def test_messages_are_the_answer(chunks: list[CachedChunk], start: int) -> None:
    """Wherever a reader begins."""
    position = start = min(start, len(chunks) - 1)
    messages = []
    while position < len(chunks):
        taken = message_from(chunks, position)
        position += len(taken)
        messages.append(joined(taken))
        assert len(taken) == 1 or len(messages[-1].text) <= MOST_TEXT
        assert messages[-1].since_start_us == taken[-1].since_start_us
    rest = chunks[start:]
    assert [i for message in messages for i in message.token_ids] == [i for chunk in rest for i in chunk.token_ids]
    assert "".join(message.text for message in messages) == "".join(chunk.text for chunk in rest)


def test_so_many_chunks_share_a_message_at_most() -> None:
    chunks = [CachedChunk(token_ids=[i]) for i in range(2 * MOST_CHUNKS + 1)]
    assert len(message_from(chunks, 0)) == len(message_from(chunks, MOST_CHUNKS)) == MOST_CHUNKS
    assert len(message_from(chunks, 2 * MOST_CHUNKS)) == 1


def test_joining_leaves_what_is_joined_as_it_was() -> None:
    """It is the log that other readers and the cache have, too."""
    chunks = [CachedChunk(token_ids=[1], text="a"), CachedChunk(token_ids=[2], text="b")]
    joined(chunks)
    assert [list(chunk.token_ids) for chunk in chunks] == [[1], [2]]


def test_a_chunk_without_tokens_takes_room() -> None:
    assert [weight(CachedChunk(token_ids=ids)) for ids in ([], [1], [1, 2])] == [1, 1, 2]
