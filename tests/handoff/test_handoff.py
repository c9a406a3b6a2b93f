"""KV leaves one pool and arrives in another bit for bit, under credits, in any order; nothing broken is accepted."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.handoff import wire
from baton.handoff.receiver import KvReceiver
from baton.handoff.sender import KvSender
from baton.handoff.wire import HandoffCorrupt
from baton.internal.v1 import kv_pb2, prefill_pb2

LAYERS = (
    LayerSpec(key="0", heads=2, key_dim=8, value_dim=8),
    LayerSpec(key="1", heads=1, key_dim=24, value_dim=16, window=4),
    LayerSpec(key="2", heads=4, key_dim=4, value_dim=4),
)


def pool(seed: int, slots: int = 3, tokens: int = 64) -> tuple[PoolLayout, bytearray]:
    layout = PoolLayout.build(LAYERS, KvDtype.FLOAT32, slots, tokens)
    return layout, bytearray(random.Random(seed).randbytes(layout.total_bytes))


def done(sender: KvSender) -> prefill_pb2.Done:
    return prefill_pb2.Done(chunks=sender.digest.chunks, bytes=sender.digest.bytes, checksum=sender.digest.value())


def chunks_of(layout: PoolLayout, memory: bytearray, slot: int, start: int, stop: int) -> list[kv_pb2.KvChunk]:
    return [
        wire.read_chunk(layout, memoryview(memory), slot, layer, first, min(first + 7, stop))
        for layer in range(len(LAYERS))
        for first in range(start, stop, 7)
    ]


def digest_of(chunks: list[kv_pb2.KvChunk]) -> prefill_pb2.Done:
    digest = wire.StreamDigest()
    for chunk in chunks:
        digest.add(chunk)
    return prefill_pb2.Done(chunks=digest.chunks, bytes=digest.bytes, checksum=digest.value())


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 64),
    start=st.integers(0, 63),
    credit=st.integers(0, 30_000),
    order=st.randoms(),
)
def test_any_order_arrives_bit_equal(seed: int, tokens: int, start: int, credit: int, order: random.Random) -> None:
    start = min(start, tokens - 1)
    layout, source = pool(seed)
    _, target = pool(seed + 1)
    before = bytes(target)
    chunks = chunks_of(layout, source, 2, start, tokens)
    order.shuffle(chunks)
    receiver = KvReceiver(layout, memoryview(target), 1, start, tokens, credit)
    total = sum(len(chunk.data) for chunk in chunks)
    assert receiver.all_granted == (credit >= total)
    # With what it starts with, the sender is granted exactly what it needs.
    assert sum(receiver.accept(chunk) for chunk in chunks) == max(0, total - credit)
    assert receiver.all_granted
    assert receiver.received_bytes == total
    receiver.verify(digest_of(chunks))
    for layer in range(len(LAYERS)):
        got = layout.rows(memoryview(target), layer, 1, start, tokens)
        assert [bytes(x) for x in got] == [bytes(x) for x in layout.rows(memoryview(source), layer, 2, start, tokens)]
        # Nothing beside the range was touched.
        for a, b in ((0, start), (tokens, 64)):
            old = layout.rows(memoryview(before), layer, 1, a, b)
            assert [bytes(x) for x in layout.rows(memoryview(target), layer, 1, a, b)] == [bytes(x) for x in old]


def test_every_flipped_byte_is_caught() -> None:
    layout, source = pool(3)
    rng = random.Random(9)
    caught = 0
    for _ in range(1000):
        chunk = wire.read_chunk(layout, memoryview(source), 0, rng.randrange(3), 5, 5 + rng.randrange(1, 30))
        data = bytearray(chunk.data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        chunk.data = bytes(data)
        receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 0, 64, 0)
        with pytest.raises(HandoffCorrupt, match="checksum"):
            receiver.accept(chunk)
        caught += 1
    assert caught == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "outside"),
        ({"start": 60}, "outside"),
        ({"start": 1}, "outside"),
        ({"tokens": 0}, "outside"),
        ({"tokens": 5}, "bytes"),
        ({"layer": 1}, "bytes"),
        ({"start": 9}, "checksum"),
        ({"codec": kv_pb2.KV_CODEC_INT8}, "codec"),
        ({"data": b""}, "bytes"),
    ],
)
def test_a_chunk_that_lies_about_itself_is_refused(change: dict[str, int], message: str) -> None:
    layout, source = pool(4)
    chunk = wire.read_chunk(layout, memoryview(source), 0, 0, 8, 12)
    for field, value in change.items():
        setattr(chunk, field, value)
    receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 2, 40, 0)
    with pytest.raises(HandoffCorrupt, match=message):
        receiver.accept(chunk)


def test_missing_and_repeated_chunks_are_refused() -> None:
    layout, source = pool(5)
    chunks = chunks_of(layout, source, 0, 0, 30)
    receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 0, 30, 0)
    for chunk in chunks[:-1]:
        receiver.accept(chunk)
    with pytest.raises(HandoffCorrupt, match="not the KV sent"):
        receiver.verify(digest_of(chunks))
    with pytest.raises(HandoffCorrupt, match="never came"):
        receiver.verify(digest_of(chunks[:-1]))
    with pytest.raises(HandoffCorrupt, match="twice"):
        receiver.accept(chunks[0])


async def test_credit_bounds_what_is_in_flight_and_the_first_token_overtakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK_BYTES", 512)
    layout, source = pool(6)
    sender = KvSender(layout, memoryview(source), credit_bytes=1024)
    for layer in range(len(LAYERS)):
        sender.ready(0, layer, 0, 64)
    target = bytearray(layout.total_bytes)
    receiver = KvReceiver(layout, memoryview(target), 0, 0, 64, 1024)
    messages = sender.messages()
    in_flight = 0
    kinds: list[str] = []
    for _ in range(2):
        message = await anext(messages)
        in_flight += receiver.accept(message.chunk)
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert 0 < in_flight <= 1024
    # Out of credit, with chunks queued: the first token goes out all the same.
    sender.control(prefill_pb2.PrefillResponse(first_token=prefill_pb2.FirstToken(token_id=7)))
    assert (await asyncio.wait_for(waiting, 1)).first_token.token_id == 7
    sender.finish()
    sender.credit(in_flight)
    async for message in messages:
        kinds.append(message.WhichOneof("message") or "")
        sender.credit(receiver.accept(message.chunk))
    assert set(kinds) == {"chunk"}
    receiver.verify(done(sender))
    for layer in range(len(LAYERS)):
        assert [bytes(x) for x in layout.rows(memoryview(target), layer, 0, 0, 64)] == [
            bytes(x) for x in layout.rows(memoryview(source), layer, 0, 0, 64)
        ]


async def test_a_failure_ends_the_messages() -> None:
    layout, source = pool(7)
    sender = KvSender(layout, memoryview(source), credit_bytes=1 << 20)
    messages = sender.messages()
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    sender.fail(HandoffCorrupt("gone"))
    with pytest.raises(HandoffCorrupt, match="gone"):
        await asyncio.wait_for(waiting, 1)
