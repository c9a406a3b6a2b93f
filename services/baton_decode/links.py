"""How fast KV comes from each prefill service: how much of it may be under way, and whether to code it. Pure."""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from baton.handoff.codec import Codec
from baton.handoff.transport import Transport
from baton.internal.v1 import kv_pb2

_KEPT: Final = 256  # links remembered
_LEAST_BYTES: Final = 256 * 1024  # what moved less says nothing of bandwidth
_RETRY_SECONDS: Final = 10.0  # a transport that failed is left alone for so long
_LEAST_CREDIT: Final = 1024 * 1024
_IN_FLIGHT_SECONDS: Final = 0.01
_WEIGHT: Final = 0.3  # of the newest measurement
CODER_BYTES_PER_SECOND: Final = 400e6
"""KV that int8 coding and decoding take in per second, one after the other, on one CPU core. See docs/handoff.md."""
INT8_RATIO: Final = 0.52
"""Bytes left of bfloat16 KV."""


class KvCodecChoice(enum.StrEnum):
    """What a decode service is told to ask for."""

    RAW = "raw"  # bit for bit
    INT8 = "int8"
    AUTO = "auto"  # int8 where the link is so slow that it pays


def int8_pays(bytes_per_second: float) -> bool:
    """Whether coding takes less time than the bytes it saves would take on this link."""
    return (1 - INT8_RATIO) / bytes_per_second > 1 / CODER_BYTES_PER_SECOND


@dataclass
class Links:
    """What is known of the way to each prefill target: bandwidth, a moving average, what failed, and its pool."""

    _speeds: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _failed: OrderedDict[tuple[str, Transport], float] = field(default_factory=OrderedDict)  # until when
    _memories: OrderedDict[str, str] = field(default_factory=OrderedDict)

    def failed(self, target: str, transport: Transport, now: float) -> None:
        """A transport did not work with a target: it is not asked for again so soon."""
        self._failed[target, transport] = now + _RETRY_SECONDS
        self._failed.move_to_end((target, transport))
        if len(self._failed) > _KEPT:
            self._failed.popitem(last=False)

    def read_from(self, target: str, memory: str) -> None:
        """KV of a target was read from the pool it lends by this name."""
        self._memories[target] = memory
        self._memories.move_to_end(target)
        if len(self._memories) > _KEPT:
            self._memories.popitem(last=False)

    def memory(self, target: str) -> str:
        """The pool that a target's KV was read from last; empty: none."""
        return self._memories.get(target, "")

    def transports(self, wanted: tuple[Transport, ...], target: str, now: float) -> tuple[Transport, ...]:
        """What to ask a target for, of what is wanted: all of it if nothing else is left."""
        return tuple(t for t in wanted if self._failed.get((target, t), 0.0) <= now) or wanted

    def moved(self, target: str, size: int, duration_ns: int) -> None:
        """A handoff moved so many bytes in the call, in so long a time."""
        if size < _LEAST_BYTES or duration_ns <= 0:
            return
        speed = size / duration_ns * 1e9
        known = self._speeds.get(target)
        self._speeds[target] = speed if known is None else known + _WEIGHT * (speed - known)
        self._speeds.move_to_end(target)
        if len(self._speeds) > _KEPT:
            self._speeds.popitem(last=False)

    def credit(self, target: str, most: int) -> int:
        """KV bytes that may be under way: what the link moves in 10 ms, but at least 1 MiB, or `most` if that is less.

        The first token, and the keepalive that must be answered within a second, wait behind what is in flight: a slow
        link, or one that is not known yet, gets little.
        """
        speed = self._speeds.get(target, 0.0)
        return min(most, max(_LEAST_CREDIT, int(speed * _IN_FLIGHT_SECONDS)))

    def codecs(self, choice: KvCodecChoice, target: str) -> tuple[Codec, ...]:
        """What to offer a prefill service, the most wanted first."""
        if choice is KvCodecChoice.AUTO:
            speed = self._speeds.get(target)
            coded = speed is not None and int8_pays(speed)
        else:
            coded = choice is KvCodecChoice.INT8
        return (kv_pb2.KV_CODEC_INT8, kv_pb2.KV_CODEC_RAW) if coded else (kv_pb2.KV_CODEC_RAW,)
