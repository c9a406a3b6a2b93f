"""Leases: words in shared memory that say which calls still hold the KV they told of.

A call's word holds a number that no other call ever gets, from its beginning until just before its KV is let go. Who
has read KV and then finds the number has read what the call held, and need not ask. The table is lent with the pool.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final

from baton.internal.v1 import prefill_pb2

_WORDS: Final = 4096  # calls with a lease at a time; those beyond go without
_BYTES: Final = 8 * _WORDS


class LeaseTable:
    """The lender's side, for one thread.

    Attributes:
        fd: of its memory, which can neither shrink nor grow.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("baton-leases", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, _BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._words = memoryview(mmap.mmap(self.fd, _BYTES)).cast("Q")
        self._free = list(reversed(range(_WORDS)))
        self._values = count(1)

    @contextmanager
    def hold(self) -> Iterator[prefill_pb2.Lease | None]:
        """A lease for the block; to be left before the KV is let go. None: all are taken."""
        if not self._free:
            yield None
            return
        index = self._free.pop()
        value = self._words[index] = next(self._values)
        try:
            yield prefill_pb2.Lease(index=index, value=value)
        finally:
            self._words[index] = 0
            self._free.append(index)

    def close(self) -> None:
        """Lend no more. Who has it mapped finds what it held last."""
        os.close(self.fd)


class LeaseView:
    """The borrower's side.

    Args:
        fd: of the table; not needed any more afterwards.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, fd: int) -> None:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the table of leases could be taken away while it is read")
        self._mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._words = memoryview(self._mapped).cast("Q")
        self._lock = threading.Lock()

    def held(self, lease: prefill_pb2.Lease) -> bool:
        """Whether the call still holds its KV: all that was read of it before is good."""
        if not lease.value or lease.index >= len(self._words):
            return False
        # Processors that reorder reads must not look at the word before they have read the KV: release, then acquire.
        for _ in range(2):
            with self._lock:
                pass
        return self._words[lease.index] == lease.value

    def close(self) -> None:
        """Let it go."""
        self._words.release()
        self._mapped.close()
