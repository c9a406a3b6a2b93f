"""What runs beside what: events and a side stream on a CUDA device; on a CPU everything is over when the call returns.

The rest of this package is written against `Streams` and never asks which device it is on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until all work before it is done."""


class Streams(Protocol):
    """Order of a device's work."""

    pinned: bool  # whether host buffers should be page-locked

    def record(self) -> Event:
        """An event after all that was launched so far, on the current stream."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is launched inside runs after all launched so far, and beside what is launched later."""

    def register(self, address: int, size: int) -> bool:
        """Page-lock memory that somebody else allocated; whether that worked."""

    def unregister(self, address: int) -> None:
        """Undo `register`, before the memory goes."""


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HostStreams:
    """Of a CPU."""

    pinned = False

    def record(self) -> Event:
        """One that is over."""
        return _Done()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing runs beside anything."""
        yield

    def register(self, address: int, size: int) -> bool:
        """Nobody would gain by it."""
        return False

    def unregister(self, address: int) -> None:
        """Nothing was done."""


class CudaStreams:
    """Of a CUDA device.

    Args:
        device: which.
    """

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self) -> Event:
        """On the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the side stream."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def register(self, address: int, size: int) -> bool:
        """By cudaHostRegister. Memory it refuses stays pageable: copies then work, but block."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(address, size, 0)) == 0:
            return True
        # The refusal stays the runtime's last error until somebody asks: the next launch would be blamed for it.
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)
        return False

    def unregister(self, address: int) -> None:
        """After all copies are over."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        runtime.cudaHostUnregister(address)


def streams_of(device: torch.device) -> Streams:
    """Streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
