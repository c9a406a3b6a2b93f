"""Starting an engine process and following it until it can serve. asyncio; no torch."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from baton.engine.config import EngineConfig
from baton.engine.errors import EngineError
from baton.engine.frames import Unframer
from baton.engine.messages import LoadFailed, Loading, Ready, event_decoder

OnProgress = Callable[[str, float], None]

# How long a thread of torch's spins, in turns of a loop, before it sleeps. Where others want its core, all threads wait
# for that core at every operator: with the default, 300,000, two engines on the same cores take 25 times as long for
# a step as with this.
_SPIN = 3_000
_SPIN_ON_OWN_CORES = 10_000  # through the gaps between operators, a tenth of a step; shared after all, it costs twice


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running engine and the ways to it.

    Attributes:
        process: its process.
        reader, writer: its events, our commands.
        unframer: of `reader`; it may hold the beginning of a frame.
        ready: what it said of itself.
        memory: its KV pool, shared.
        memory_fd: the file the pool is; whoever has this closes it.
    """

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    unframer: Unframer
    ready: Ready
    memory: mmap.mmap
    memory_fd: int


async def launch(
    config: EngineConfig, on_progress: OnProgress, timeout: float, *, own_cores: bool = False
) -> EngineProcess:
    """Start an engine process and wait until it can serve.

    Args:
        config: of the engine.
        on_progress: told of each stage of loading.
        timeout: seconds.
        own_cores: nobody else uses the cores that this process runs on, which the engine inherits.

    Raises:
        EngineError: it cannot serve this model, ended, or was not ready within `timeout` seconds.
    """
    here, there = socket.socketpair()
    memory_fd = -1
    process: asyncio.subprocess.Process | None = None
    writer: asyncio.StreamWriter | None = None
    try:
        memory_fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        async with asyncio.timeout(timeout):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "baton.engine.process",
                f"--socket-fd={there.fileno()}",
                f"--memory-fd={memory_fd}",
                f"--config={config.to_json()}",
                pass_fds=(there.fileno(), memory_fd),
                stdin=asyncio.subprocess.DEVNULL,
                env={"GOMP_SPINCOUNT": str(_SPIN_ON_OWN_CORES if own_cores else _SPIN), **os.environ},
            )
            there.close()
            reader, writer = await asyncio.open_connection(sock=here)
            unframer = Unframer()
            ready = await _ready(reader, unframer, on_progress)
        memory = mmap.mmap(memory_fd, ready.layout.total_bytes)
        return EngineProcess(process, reader, writer, unframer, ready, memory, memory_fd)
    except BaseException as error:
        if memory_fd >= 0:
            os.close(memory_fd)
        if writer is not None:
            writer.close()
        # One whose end of the socket is closed ends by itself; to kill it would lose its status.
        if process is not None and process.returncode is None and not isinstance(error, asyncio.IncompleteReadError):
            process.kill()
        status = await process.wait() if process is not None else None
        if isinstance(error, TimeoutError):
            raise EngineError(f"the engine was not ready after {timeout:g} s") from None
        if isinstance(error, asyncio.IncompleteReadError):
            raise EngineError(f"the engine process ended with status {status} while loading") from None
        raise
    finally:
        there.close()
        if writer is None:
            here.close()


async def _ready(reader: asyncio.StreamReader, unframer: Unframer, on_progress: OnProgress) -> Ready:
    """Follow the loading to its end."""
    while data := await reader.read(1 << 16):
        for body in unframer.feed(data):
            for event in event_decoder.decode(body):
                match event:
                    case Loading():
                        on_progress(event.stage, event.fraction)
                    case LoadFailed():
                        raise EngineError(event.message)
                    case Ready():
                        return event
    raise asyncio.IncompleteReadError(b"", None)
