"""Which process of this host has a connection."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def inode_of(port: int) -> str:
    """Of the socket of this host that is bound to a port and connected; empty: none is."""
    for table in ("/proc/net/tcp6", "/proc/net/tcp"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[9] != "0":
                return fields[9]
    return ""


def has_open(pid: int, inode: str) -> bool:
    """Whether a process has a socket open."""
    wanted = f"socket:[{inode}]"
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}") == wanted:
                return True
    return False
