"""KV leaves one pool and arrives in another bit for bit, under credits, in any order; nothing broken is accepted."""

from __future__ import annotations

import asyncio
import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.handoff import sender as sender_module
from baton.handoff import wire
from baton.handoff.encoding import Message, deserialize, serialize
from baton.handoff.receiver import KvReceiver
from baton.handoff.sender import CallerLeft, CallerSilent, KvSender, make_chunk
from baton.handoff.wire import Chunk, HandoffCorrupt
from baton.internal.v1 import kv_pb2, prefill_pb2
from baton.v1 import inference_pb2

LAYERS = (
    LayerSpec(key="0", heads=2, key_dim=8, value_dim=8),
    LayerSpec(key="1", heads=1, key_dim=24, value_dim=16, window=4),
    LayerSpec(key="2", heads=4, key_dim=4, value_dim=4),
)


def pool(seed: int, slots: int = 3, tokens: int = 64) -> tuple[PoolLayout, bytearray]:
    layout = PoolLayout.build(LAYERS, KvDtype.FLOAT32, slots, tokens)
    return layout, bytearray(random.Random(seed).randbytes(layout.total_bytes))


def read(layout: PoolLayout, memory: bytearray, slot: int, layer: int, start: int, stop: int) -> Chunk:
    """A chunk as it is received: in one piece."""
    chunk = make_chunk(layout, memoryview(memory), layer, slot, start, stop, kv_pb2.KV_CODEC_RAW)
    return Chunk(chunk.header, (b"".join(chunk.parts),))


def chunks_of(layout: PoolLayout, memory: bytearray, slot: int, start: int, stop: int) -> list[Chunk]:
    return [
        read(layout, memory, slot, layer, first, min(first + 7, stop))
        for layer in range(len(LAYERS))
        for first in range(wire.first_moved(layout, layer, start, stop), stop, 7)
    ]


def moved(layout: PoolLayout, memory: bytearray, slot: int, start: int, stop: int) -> list[bytes]:
    """All that has to move of tokens [start, stop)."""
    return [
        bytes(part)
        for layer in range(len(LAYERS))
        for part in layout.rows(memoryview(memory), layer, slot, wire.first_moved(layout, layer, start, stop), stop)
    ]


def digest_of(chunks: list[Chunk]) -> prefill_pb2.Done:
    digest = wire.StreamDigest()
    for chunk in chunks:
        digest.add(chunk.header.checksum, chunk.size)
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
    total = sum(chunk.size for chunk in chunks)
    assert receiver.all_granted == (credit >= total)
    # With what it starts with, the sender is granted exactly what it needs: here no chunk fits into less.
    assert sum(receiver.accept(chunk) for chunk in chunks) == max(0, total - credit)
    assert receiver.all_granted
    assert receiver.received_bytes == total
    receiver.verify(digest_of(chunks))
    for layer in range(len(LAYERS)):
        first = wire.first_moved(layout, layer, start, tokens)
        got = layout.rows(memoryview(target), layer, 1, first, tokens)
        assert [bytes(x) for x in got] == [bytes(x) for x in layout.rows(memoryview(source), layer, 2, first, tokens)]
        # Nothing beside the range was touched.
        for a, b in ((0, first), (tokens, 64)):
            old = layout.rows(memoryview(before), layer, 1, a, b)
            assert [bytes(x) for x in layout.rows(memoryview(target), layer, 1, a, b)] == [bytes(x) for x in old]


def test_every_flipped_byte_is_caught() -> None:
    layout, source = pool(3)
    rng = random.Random(9)
    caught = 0
    for _ in range(1000):
        start = 61 + rng.randrange(3)
        chunk = read(layout, source, 0, rng.randrange(3), start, start + rng.randrange(1, 65 - start))
        data = bytearray(chunk.parts[0])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        chunk.parts = (bytes(data),)
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
        ({"layer": 2, "tokens": 8}, "bytes"),
        ({"layer": 1}, "outside"),  # before its window
        ({"start": 9}, "checksum"),
        ({"codec": kv_pb2.KV_CODEC_INT8}, "codec"),
        ({"parts": (b"",)}, "bytes"),
    ],
)
def test_a_chunk_that_lies_about_itself_is_refused(change: dict[str, int], message: str) -> None:
    layout, source = pool(4)
    chunk = read(layout, source, 0, 0, 8, 12)
    for field, value in change.items():
        setattr(chunk if field == "parts" else chunk.header, field, value)
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
    sender = KvSender(layout, memoryview(source), 64, credit_bytes=1024)
    sender.choose(inference_pb2.TRANSPORT_GRPC)
    for layer in range(len(LAYERS)):
        sender.ready(0, layer, 0, 64)
    target = bytearray(layout.total_bytes)
    receiver = KvReceiver(layout, memoryview(target), 0, 0, 64, 1024)
    messages = sender.messages()
    in_flight = 0
    for _ in range(2):
        in_flight += receiver.accept(received(await anext(messages)))
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
        sender.credit(receiver.accept(received(message)))
        if receiver.all_granted:
            sender.close()
    receiver.verify(sender.done())
    assert moved(layout, target, 0, 0, 64) == moved(layout, source, 0, 0, 64)


@settings(deadline=None, max_examples=60)
@given(credit=st.integers(512, 6000), steps=st.lists(st.integers(1, 64), min_size=1, max_size=8))
async def test_credit_never_runs_dry(credit: int, steps: list[int]) -> None:
    """Whatever the credit, if only the largest chunk fits: grants come seldom, but the sender never waits for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "CHUNK_BYTES", 512)
        layout, source = pool(11)
        sender = KvSender(layout, memoryview(source), 64, credit_bytes=credit)
        sender.choose(inference_pb2.TRANSPORT_GRPC)
        at = 0
        for step in [*steps, 64]:
            for layer in range(len(LAYERS)):
                sender.ready(0, layer, at, min(64, at + step))
            at = min(64, at + step)
        sender.finish()
        receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 0, 64, credit)
        left = credit
        async with asyncio.timeout(20):
            async for message in sender.messages():
                chunk = received(message)
                left -= chunk.size
                assert left >= 0, "no more than was granted is under way"
                granted = receiver.accept(chunk)
                left += granted
                sender.credit(granted)
                if receiver.all_granted:
                    sender.close()
        receiver.verify(sender.done())


def received(message: Message) -> Chunk:
    """A chunk that went over the wire and back."""
    came = deserialize(serialize(message))
    assert isinstance(came, Chunk)
    return came


async def test_nothing_goes_before_a_transport_is_chosen_and_all_of_it_again_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "CHUNK_BYTES", 512)
    layout, source = pool(8)
    sender = KvSender(layout, memoryview(source), 64, credit_bytes=1 << 20)
    for start in (0, 32):
        for layer in range(len(LAYERS)):
            sender.ready(1, layer, start, start + 32)
    messages = sender.messages()
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    sender.choose(inference_pb2.TRANSPORT_SHM)
    places = (await waiting).ranges
    assert places.transport == inference_pb2.TRANSPORT_SHM
    target = bytearray(layout.total_bytes)
    receiver = KvReceiver(layout, memoryview(target), 0, 0, 64, 1 << 20)
    for place in list(places.ranges)[:2]:
        for piece in receiver.pieces(place):
            target[piece.target : piece.target + piece.size] = source[piece.source : piece.source + piece.size]
        receiver.took(place)
    sender.choose(inference_pb2.TRANSPORT_GRPC)
    receiver.restart()
    sender.finish()
    sender.close()
    async for message in messages:
        receiver.accept(received(message))
    receiver.verify(sender.done())
    assert moved(layout, target, 0, 0, 64) == moved(layout, source, 1, 0, 64)


async def test_places_alone_bring_all_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "RANGES_BYTES", 1000)
    layout, source = pool(9)
    sender = KvSender(layout, memoryview(source), 50, credit_bytes=0)
    sender.choose(inference_pb2.TRANSPORT_NIXL)
    for layer in range(len(LAYERS)):
        sender.ready(2, layer, 3, 50)
    target = bytearray(layout.total_bytes)
    receiver = KvReceiver(layout, memoryview(target), 1, 3, 50, 0)
    async for message in sender.messages():
        size = 0
        for place in message.ranges.ranges:
            for piece in receiver.pieces(place):
                target[piece.target : piece.target + piece.size] = source[piece.source : piece.source + piece.size]
                size += piece.size
            receiver.took(place)
        assert size <= 1000 + 128
        if message.ranges.HasField("sent"):
            receiver.verify(message.ranges.sent)
            sender.close()
        elif receiver.whole:
            sender.finish()
    receiver.verify(sender.done())
    assert moved(layout, target, 1, 3, 50) == moved(layout, source, 2, 3, 50)
    with pytest.raises(HandoffCorrupt, match="twice"):
        receiver.pieces(place)


async def test_places_of_small_layers_share_a_message_but_no_step_waits_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, source = pool(12)

    async def told(sender: KvSender, *steps: tuple[int, int]) -> list[list[int]]:
        """The layers of each message, as layer after layer becomes ready."""
        sender.choose(inference_pb2.TRANSPORT_SHM)
        messages: list[list[int]] = []

        async def listen() -> None:
            async for message in sender.messages():
                assert isinstance(message, prefill_pb2.PrefillResponse)
                messages.append([place.layer for place in message.ranges.ranges])

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            for start, stop in steps:
                for layer in range(len(LAYERS)):
                    sender.ready(1, layer, start, stop)
                    await asyncio.sleep(0.01)
            sender.finish()
            sender.close()
        return messages

    # The second layer's window leaves nothing of the first step to be told.
    assert await told(KvSender(layout, memoryview(source), 64, 0), (0, 32), (32, 64)) == [[0, 2], [0, 1, 2], []]
    monkeypatch.setattr(sender_module, "_WORTH_TELLING", 1)
    assert await told(KvSender(layout, memoryview(source), 64, 0), (0, 64)) == [[0], [1], [2], []]


async def test_a_caller_that_leaves_too_early_is_told() -> None:
    layout, source = pool(8)
    for transport in (inference_pb2.TRANSPORT_UNSPECIFIED, inference_pb2.TRANSPORT_GRPC):
        sender = KvSender(layout, memoryview(source), 64, credit_bytes=1)
        if transport:
            sender.choose(transport)
        sender.ready(0, 0, 0, 64)
        sender.close()
        with pytest.raises(CallerLeft):
            await anext(sender.messages())


async def test_a_caller_that_falls_silent_is_given_up_and_one_that_gets_on_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender_module, "STALL_SECONDS", 0.3)
    layout, source = pool(13)

    def started(transport: inference_pb2.Transport.ValueType) -> tuple[KvSender, asyncio.Task[None]]:
        async def drain(sender: KvSender) -> None:
            async for _ in sender.messages():
                pass

        sender = KvSender(layout, memoryview(source), 64, credit_bytes=1)
        if transport:
            sender.choose(transport)
        for layer in range(len(LAYERS)):
            sender.ready(0, layer, 0, 64)
        return sender, asyncio.create_task(drain(sender))

    unchosen, no_choice = started(inference_pb2.TRANSPORT_UNSPECIFIED)
    slow, no_credit = started(inference_pb2.TRANSPORT_GRPC)
    _, no_token = started(inference_pb2.TRANSPORT_GRPC)
    unchosen.finish()
    slow.finish()
    for _ in range(12):  # twice as long as silence may last
        await asyncio.sleep(0.05)
        slow.credit(1)
    assert not no_credit.done()
    for waiting in (no_choice, no_credit):
        with pytest.raises(CallerSilent, match=r"0\.3 s"):
            await asyncio.wait_for(waiting, 30)
    assert not no_token.done()  # that is up to the engine
    no_token.cancel()

    # Who reads the pool is given the time to read it.
    reading, no_end = started(inference_pb2.TRANSPORT_SHM)
    monkeypatch.setattr(sender_module, "SLOWEST_READ", 1.0)
    reading.finish()
    assert not (await asyncio.wait([no_end], timeout=0.6))[0]
    reading.close()
    await asyncio.wait_for(no_end, 30)


def test_the_wire_is_protobuf() -> None:
    """What is put together by hand is what protobuf would make of it, and reads what protobuf made."""
    layout, source = pool(10)
    for tokens in (1, 5, 30, 64):
        chunk = make_chunk(layout, memoryview(source), 0, 1, 64 - tokens, 64, kv_pb2.KV_CODEC_RAW)
        chunk.header.since_accepted_ns = 1 << 40
        data = b"".join(chunk.parts)
        whole = prefill_pb2.PrefillResponse.FromString(serialize(chunk))
        assert whole.chunk.data == data
        whole.chunk.ClearField("data")
        assert whole.chunk == chunk.header
        whole.chunk.data = data
        for raw in (serialize(chunk), whole.SerializeToString()):
            came = deserialize(raw)
            assert isinstance(came, Chunk)
            assert came.header == chunk.header
            assert b"".join(came.parts) == data
    first = prefill_pb2.PrefillResponse(first_token=prefill_pb2.FirstToken(token_id=3))
    assert deserialize(serialize(first)) == first


@settings(deadline=None, max_examples=300)
@given(raw=st.binary(max_size=60), chunk=st.booleans())
def test_garbage_is_garbage_to_protobuf_too(raw: bytes, chunk: bool) -> None:
    raw = b"\x12" + raw if chunk else raw
    try:
        expected = prefill_pb2.PrefillResponse.FromString(raw)
    except DecodeError:
        with pytest.raises(DecodeError):
            deserialize(raw)
        return
    came = deserialize(raw)
    if isinstance(came, Chunk):
        assert b"".join(came.parts) == expected.chunk.data
        expected.chunk.ClearField("data")
        assert came.header.SerializeToString(deterministic=True) == expected.chunk.SerializeToString(deterministic=True)
    else:
        assert came.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


async def test_a_failure_ends_the_messages() -> None:
    layout, source = pool(7)
    sender = KvSender(layout, memoryview(source), 64, credit_bytes=1 << 20)
    messages = sender.messages()
    waiting = asyncio.ensure_future(anext(messages))
    await asyncio.sleep(0)
    sender.fail(HandoffCorrupt("gone"))
    with pytest.raises(HandoffCorrupt, match="gone"):
        await asyncio.wait_for(waiting, 1)
