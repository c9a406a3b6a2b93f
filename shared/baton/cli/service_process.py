"""One service as a child process: its loading progress, its last log lines, its address, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from baton.cli.mesh import Process
from baton.cli.services import command

_POLL: Final = 0.05
"""Seconds between two looks at the ready file."""
_KEPT_LINES: Final = 200
_LONGEST_LINE: Final = 64 * 1024

OnLog = Callable[["ServiceProcess", dict[str, Any]], None]


class ServiceDied(Exception):
    """A service ended that should serve."""

    def __init__(self, process: ServiceProcess, exit_code: int) -> None:
        how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with code {exit_code}"
        super().__init__(f"{process.name} {how}")
        self.process = process


class ServiceProcess:
    """A service of the mesh.

    Args:
        name: unique in the mesh, for example "decode-0".
        service: "router", "cache", "prefill" or "decode".
        arguments: its flags, without the ones every service gets from here.
        environment: variables it gets on top of this process's.
        directory: where its ready file goes.
        log_directory: its output is appended to a file here; None: only the last lines are kept, in memory.
        on_log: called with every JSON log line.
    """

    def __init__(
        self,
        name: str,
        service: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        log_directory: Path | None,
        on_log: OnLog,
    ) -> None:
        self.name = name
        self.service = service
        self.stage = "waiting"
        self.fraction = 0.0
        self._environment = environment
        self.address: Process | None = None
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready_file = directory / f"{name}.json"
        self._arguments = [*arguments, "--ready-file", str(self._ready_file)]
        self._log_path = log_directory / f"{name}.log" if log_directory else None
        self._on_log = on_log
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id; None before start."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return self._process is not None and self._process.returncode is None

    def set_arguments(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Its flags, and more variables, where they were not known from the start."""
        assert self._process is None
        self._environment = {**self._environment, **(environment or {})}
        self._arguments = [*arguments, "--ready-file", str(self._ready_file)]

    async def start(self) -> int:
        """Start it; returns its process id.

        Raises:
            OSError: it could not be started.
        """
        self._process = await asyncio.create_subprocess_exec(
            *command(self.service),
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **self._environment},
            # A group of its own: Ctrl-C in the terminal reaches `baton up` alone, which ends things in order.
            start_new_session=True,
        )
        self.stage = "starting"
        self._reading = asyncio.create_task(self._read(self._process))
        return self._process.pid

    async def ready(self) -> Process:
        """Wait until it serves.

        Raises:
            ServiceDied: it ended before.
        """
        while not self._ready_file.exists():
            if not self.running:
                raise await self._died()
            await asyncio.sleep(_POLL)
        ready = json.loads(self._ready_file.read_text(encoding="utf-8"))
        self.address = Process(
            name=self.name,
            service=self.service,
            grpc=ready["grpc"],
            metrics=ready["metrics"],
            pid=ready["pid"],
            admin=ready["admin"],
        )
        self.stage, self.fraction = "serving", 1.0
        return self.address

    async def died(self) -> ServiceDied:
        """Wait until it ends."""
        assert self._process is not None
        await self._process.wait()
        return await self._died()

    async def stop(self, grace: float) -> None:
        """SIGTERM, at most `grace` seconds of waiting, SIGKILL. Takes along what it started and left behind."""
        if self._process is None:
            return
        self.stage = "stopping"
        if self.running:
            self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace)
        self.kill()
        await self._process.wait()
        await self._finish_reading()
        self.stage = "stopped"

    def kill(self) -> None:
        """SIGKILL for it and everything in its process group."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _died(self) -> ServiceDied:
        assert self._process is not None
        await self._finish_reading()
        return ServiceDied(self, await self._process.wait())

    async def _finish_reading(self) -> None:
        """Let the last lines arrive. Bounded: a grandchild may hold the pipe open."""
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=1.0)
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        log_file = self._log_path.open("ab") if self._log_path else None
        try:
            rest = b""
            while data := await process.stdout.read(_LONGEST_LINE):
                if log_file is not None:
                    _append(log_file, data)
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[-_LONGEST_LINE:]
                for line in lines:
                    self._take(line.decode(errors="replace"))
            if rest:
                self._take(rest.decode(errors="replace"))
        finally:
            if log_file is not None:
                log_file.close()

    def _take(self, line: str) -> None:
        self.last_lines.append(line)
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict):
            return
        if entry.get("message") == "loading":
            self.stage = str(entry.get("stage", "loading"))
            fraction = entry.get("fraction", 0.0)
            self.fraction = float(fraction) if isinstance(fraction, int | float) else 0.0
        self._on_log(self, entry)


def _append(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
