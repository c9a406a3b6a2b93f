"""`python -m baton.engine.process`: an engine in a process of its own, started by its front and by nobody else.

Commands come and events go over an inherited socket; the KV pool is an inherited memory file. The front's end of the
socket is the process's reason to live: when it closes, the process ends, and the kernel takes everything back.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

import torch

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.errors import EngineError
from baton.engine.frames import Unframer, frame
from baton.engine.messages import Event, LoadFailed, Loading, command_decoder, event_encoder


class _FrontGone(Exception):
    """Nobody is left to serve."""


class _Link:
    """The engine's end of the socket. Writing blocks when the front does not read: its pace is the engine's limit."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unframer = Unframer()

    def emit(self, events: Sequence[Event]) -> None:
        try:
            self._socket.sendall(frame(event_encoder.encode(events)))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _FrontGone from error

    def receive(self, *, wait: bool) -> list[bytes]:
        """Frames that are here; at least a piece of one is awaited if `wait`."""
        bodies: list[bytes] = []
        while True:
            readable, _, _ = select.select([self._socket], [], [], None if wait and not bodies else 0)
            if not readable:
                return bodies
            try:
                data = self._socket.recv(1 << 20)
            except ConnectionResetError as error:
                raise _FrontGone from error
            if not data:
                raise _FrontGone
            bodies += self._unframer.feed(data)
            wait = wait and not bodies


def serve(link: _Link, engine: Engine) -> None:
    """Commands and steps until told to stop."""
    while not engine.stopped:
        busy = engine.has_work
        if not busy:
            engine.tell_idle()
        for body in link.receive(wait=not busy):
            for command in command_decoder.decode(body):
                engine.handle(command)
        if engine.has_work:
            engine.step()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine; the exit status is 0 when it was stopped or its front is gone, 1 when it could not load."""
    parser = argparse.ArgumentParser(prog="baton.engine.process")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--memory-fd", type=int, required=True)
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    options = parser.parse_args(arguments)
    # Ctrl-C and service managers signal the whole group: the front decides when the engine may go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = EngineConfig.from_json(options.config)
    torch.set_num_threads(config.threads)
    link = _Link(socket.socket(fileno=options.socket_fd))
    try:
        try:
            engine = Engine.load(
                config, link.emit, options.memory_fd, lambda stage, done: link.emit([Loading(stage, done)])
            )
        except EngineError as error:
            link.emit([LoadFailed(str(error))])
            return 1
        os.close(options.memory_fd)
        # What was loaded stays: the collector need not look at it again in the middle of a step.
        gc.collect()
        gc.freeze()
        link.emit([engine.ready(os.getpid())])
        serve(link, engine)
    except _FrontGone:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
