"""Close a server's connections from outside gRPC."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress


def hang_up(port: int) -> None:
    """Stop listening on a TCP port of this process, and end the connections that were made to it.

    gRPC's own shutdown cancels calls that come in while it happens, and a caller takes that for its own doing. Of a
    connection that is closed every caller knows that the other side is gone.
    """
    sockets = [found for fd in _descriptors() if (found := _on_port(fd, port)) is not None]
    try:
        for listens in (True, False):  # or they come back at once
            for one in sockets:
                if bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is listens:
                    with suppress(OSError):  # the other side was quicker
                        one.shutdown(socket.SHUT_RDWR)
    finally:
        for one in sockets:
            one.close()


def _descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return []  # not Linux: callers may see calls cancelled


def _on_port(descriptor: int, port: int) -> socket.socket | None:
    """A socket of our own for a descriptor whose local end is the port."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        found = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return None  # closed meanwhile
    try:
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port:
            return found
    except OSError:
        pass
    found.close()
    return None
