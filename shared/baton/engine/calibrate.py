"""Up to how many rows int8 is the faster way through a linear layer on this machine: measured once, kept on disk."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from baton.engine.config import EngineConfig
from baton.engine.kernels.build import cache_directory
from baton.engine.linear import Linear

_ROWS = (1, 4, 16, 64, 256)
_REPEATS = 7


@dataclass(slots=True)
class Calibration:
    """Row limits by shape of the layer.

    Attributes:
        path: file they are kept in; None: they are not.
        machine: what they hold for.
        limits: "out x in, dtype, other layer" -> most rows at which int8 was the faster one; 0: never.
    """

    path: Path | None
    machine: str
    limits: dict[str, int] = field(default_factory=dict)
    _changed: bool = False

    @classmethod
    def open(cls, config: EngineConfig, directory: Path | None = None) -> Calibration:
        """What is known of this machine with so many threads; an unreadable file is an empty one."""
        directory = directory or cache_directory()
        path = None if directory is None else directory / "calibration.json"
        calibration = cls(path, f"{_cpu()}, {config.threads} threads, torch {torch.__version__}")
        if path is None:
            return calibration
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, int]])
            calibration.limits = known.get(calibration.machine, {})
        return calibration

    def rows(self, int8: Linear, other: Linear) -> int:
        """Most rows at which `int8` beats `other`, both of the same shape and element type; measured if not known."""
        kind = f"{other.out_features} x {other.in_features}, {other.weight.dtype}, {type(other).__name__}"
        if kind not in self.limits:
            self.limits[kind] = _measure(int8, other)
            self._changed = True
        return self.limits[kind]

    def save(self) -> None:
        """Keep what was measured for the next start. A directory that cannot be written costs only the time again."""
        if not self._changed or self.path is None:
            return
        known: dict[str, dict[str, int]] = {}
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(self.path.read_bytes(), type=dict[str, dict[str, int]])
        known[self.machine] = self.limits
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_bytes(msgspec.json.format(msgspec.json.encode(known)))
            part.replace(self.path)


def _measure(int8: Linear, other: Linear) -> int:
    limit = 0
    for rows in _ROWS:
        x = torch.randn(1, rows, other.in_features).to(other.weight.dtype)
        times = {layer: min(_time(layer, x) for _ in range(_REPEATS)) for layer in (int8, other)}
        if times[int8] >= times[other]:
            break
        limit = rows
    return limit


def _time(layer: Linear, x: torch.Tensor) -> int:
    """Nanoseconds of one call with weights that are not in the core's own caches."""
    _evict()
    started = time.perf_counter_ns()
    layer(x)
    return time.perf_counter_ns() - started


_FILLER = torch.zeros(4 << 20, dtype=torch.float32)


def _evict() -> None:
    """Read 16 MiB of something else: in a step, other layers ran since this one's last time."""
    _FILLER.sum()


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
