"""A connection's owner is found by its port."""

from __future__ import annotations

import os
import socket

from tests.faults.owners import has_open, inode_of


def test_this_process_has_the_connection_it_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        inode = inode_of(client.getsockname()[1])
        assert inode
        assert has_open(os.getpid(), inode)
        assert not has_open(os.getppid(), inode)
    assert not has_open(os.getpid(), inode)
