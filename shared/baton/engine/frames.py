"""Frames on the socket between a front and its engine: four bytes of length, then a MessagePack list of messages."""

from __future__ import annotations

import struct

LENGTH = struct.Struct("<I")
MAX_FRAME = 1 << 28
"""Most bytes of one frame. The longest are submits of long prompts; anything above is a broken stream."""


class BrokenStream(Exception):
    """What arrived is not a stream of frames."""


def frame(body: bytes) -> bytes:
    """One frame."""
    return LENGTH.pack(len(body)) + body


class Unframer:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies of the frames that `data` completes.

        Raises:
            BrokenStream: a length is impossible.
        """
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, start)
            if size > MAX_FRAME:
                raise BrokenStream(f"a frame of {size} bytes")
            if len(self._buffer) - start - LENGTH.size < size:
                break
            start += LENGTH.size
            bodies.append(bytes(self._buffer[start : start + size]))
            start += size
        del self._buffer[:start]
        return bodies
