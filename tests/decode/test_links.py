"""What the measured speed of a link decides."""

from __future__ import annotations

import pytest

from baton.internal.v1 import kv_pb2
from baton.v1.inference_pb2 import TRANSPORT_GRPC, TRANSPORT_SHM
from baton_decode.links import CODER_BYTES_PER_SECOND, INT8_RATIO, KvCodecChoice, Links, int8_pays

MIB = 1 << 20
RAW, INT8 = kv_pb2.KV_CODEC_RAW, kv_pb2.KV_CODEC_INT8


def measured(*bytes_per_second: float, target: str = "a:1") -> Links:
    links = Links()
    for speed in bytes_per_second:
        links.moved(target, 10 * MIB, int(10 * MIB / speed * 1e9))
    return links


@pytest.mark.parametrize(("speed", "credit"), [(1.25e6, 1), (40e6, 1), (400e6, 400e6 * 0.01 / MIB), (2e9, 8)])
def test_a_slow_link_gets_little_credit(speed: float, credit: float) -> None:
    assert measured(speed).credit("a:1", 8 * MIB) == pytest.approx(credit * MIB, abs=1000)


def test_an_unknown_link_is_taken_for_a_slow_one() -> None:
    links = measured(1e9)
    assert links.credit("b:1", 4 * MIB) == MIB
    assert links.codecs(KvCodecChoice.AUTO, "b:1") == (RAW,), "and nothing is coded on a guess"


@pytest.mark.parametrize("speed", [1e6, 20e6, 60e6, 80e6, 200e6, 2e9])
def test_int8_only_where_it_is_sooner(speed: float) -> None:
    size = 100 * MIB
    raw = size / speed
    coded = size / CODER_BYTES_PER_SECOND + size * INT8_RATIO / speed
    assert int8_pays(speed) == (coded < raw)
    assert measured(speed).codecs(KvCodecChoice.AUTO, "a:1") == ((INT8, RAW) if coded < raw else (RAW,))
    assert measured(speed).codecs(KvCodecChoice.RAW, "a:1") == (RAW,)
    assert measured(speed).codecs(KvCodecChoice.INT8, "a:1") == (INT8, RAW)


def test_it_follows_the_link_and_ignores_what_is_too_small() -> None:
    links = measured(1e9, *[1e6] * 20)
    assert int8_pays(1e6)
    assert links.codecs(KvCodecChoice.AUTO, "a:1") == (INT8, RAW)
    links.moved("a:1", 1000, 1)
    assert links.codecs(KvCodecChoice.AUTO, "a:1") == (INT8, RAW)


def test_what_is_remembered_is_bounded() -> None:
    links = Links()
    for i in range(1000):
        links.moved(f"host-{i}:1", MIB, 1000)
    assert links.credit("host-999:1", 8 * MIB) == 8 * MIB
    assert links.credit("host-0:1", 4 * MIB) == MIB


def test_a_transport_that_failed_is_left_alone_for_a_while() -> None:
    links = Links()
    wanted = (TRANSPORT_SHM, TRANSPORT_GRPC)
    links.failed("a:1", TRANSPORT_SHM, now=100.0)
    assert links.transports(wanted, "a:1", now=109.0) == (TRANSPORT_GRPC,)
    assert links.transports(wanted, "b:1", now=109.0) == wanted
    assert links.transports((TRANSPORT_SHM,), "a:1", now=109.0) == (TRANSPORT_SHM,), "what is forced is tried again"
    assert links.transports(wanted, "a:1", now=110.0) == wanted
    for i in range(1000):
        links.failed(f"host-{i}:1", TRANSPORT_SHM, now=0.0)
    assert len(links._failed) <= 256
