"""Shared memory of one host: a prefill service lends its pool, for reading, to whoever can prove to be meant.

The pool is a memory file without a name. Its descriptor, and that of the table of leases, go over a Unix socket, whose
name cannot be guessed, in a directory that only this user may enter; who connects must say a token. Name and token come
over the gRPC call. To have reached the socket is the proof that the host is shared; processes in two containers share
the directory as a volume.

The memory lives as long as a process has it mapped, so the connection stays: when the lender is gone, killed or not,
the connection breaks and the borrower lets the memory go. All that a killed lender leaves behind is its socket's name,
which the next one to start removes.
"""

from __future__ import annotations

import asyncio
import fcntl
import hmac
import logging
import mmap
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from baton.handoff.leases import LeaseTable, LeaseView
from baton.handoff.transport import TransportFailed
from baton.internal.v1 import prefill_pb2

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"kv-[0-9a-f]{32}")
_TOKEN_BYTES: Final = 32
_SECONDS: Final = 1.0  # to connect, to say the token, to get the descriptor
_BORROWERS: Final = 256  # connections of one lender at a time


def default_directory() -> Path:
    """Where the services of one user and host meet when nothing else is said."""
    return Path("/dev/shm") / f"baton-{os.geteuid()}"


@asynccontextmanager
async def lending(directory: Path, memory_fd: int, leases: LeaseTable) -> AsyncIterator[prefill_pb2.SharedMemory]:
    """Lend a pool as long as the block lasts; gives what a borrower must know.

    Args:
        directory: of the socket; made if it is not there.
        memory_fd: the pool, a memory file that allows seals. It can neither shrink nor grow from here on: a borrower
            that reads where nothing is would be killed.
        leases: which calls hold what they told of.

    Raises:
        TransportFailed: the directory is not private, or the socket cannot be there.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    name = f"kv-{secrets.token_hex(16)}"
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    read_only: list[int] = []
    try:
        try:
            _open_door(door, directory, name)
            fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            for fd in (memory_fd, leases.fd):
                read_only.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise TransportFailed(f"cannot lend memory: {error.strerror or error}") from None
        door.setblocking(False)
        accepting = asyncio.create_task(_accept(door, token, read_only))
        try:
            yield prefill_pb2.SharedMemory(name=name, token=token)
        finally:
            accepting.cancel()
            with suppress(asyncio.CancelledError):
                await accepting
    finally:
        door.close()
        with suppress(OSError):  # gone, or never there: a directory that is not ours says no here as well
            (directory / name).unlink()
        for fd in read_only:
            os.close(fd)


def _open_door(door: socket.socket, directory: Path, name: str) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _inside(directory) as place:
        _sweep(place)
        # Not under its name until it listens: a sweep would take it for a dead one.
        draft = f"{place / name}.new"
        door.bind(draft)
        os.chmod(draft, 0o600)
        door.listen(16)
        os.rename(draft, place / name)


async def _accept(door: socket.socket, token: bytes, lent: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(_BORROWERS)
    async with asyncio.TaskGroup() as group:
        while True:
            await room.acquire()
            try:
                connection, _ = await loop.sock_accept(door)
            except OSError:  # no descriptor left: callers fall back to another transport meanwhile
                room.release()
                await asyncio.sleep(0.1)
                continue
            group.create_task(_serve(connection, token, lent)).add_done_callback(lambda _: room.release())


async def _serve(connection: socket.socket, token: bytes, lent: Sequence[int]) -> None:
    """Lend to one process, until it or this one has enough."""
    loop = asyncio.get_running_loop()
    with connection, suppress(OSError, TimeoutError):
        connection.setblocking(False)
        said = b""
        async with asyncio.timeout(_SECONDS):
            while len(said) < _TOKEN_BYTES and (data := await loop.sock_recv(connection, _TOKEN_BYTES - len(said))):
                said += data
        if not said:
            return  # whoever starts here looks whether we live, and says nothing
        if not hmac.compare_digest(said, token):
            log.warning("a process that did not know the token asked for the pool's memory")
            return
        socket.send_fds(connection, [b"\0"], lent)
        await loop.sock_recv(connection, 1)


class LentPool:
    """A prefill service's pool in this process's memory.

    Attributes:
        memory: its bytes, read-only; empty when the lender is gone.
    """

    def __init__(self, connection: socket.socket, mapped: mmap.mmap, leases: LeaseView | None) -> None:
        self.connection = connection
        self._mapped = mapped
        self._leases = leases
        self.memory = memoryview(mapped)

    def held(self, lease: prefill_pb2.Lease) -> bool:
        """Whether a call certainly held what was read of it until now."""
        return self._leases is not None and self._leases.held(lease)

    def close(self) -> None:
        """Let it go."""
        if self._leases is not None:
            self._leases.close()
            self._leases = None
        self.memory.release()
        self.memory = memoryview(b"")
        self._mapped.close()
        self.connection.close()


async def borrow(directory: Path, offer: prefill_pb2.SharedMemory) -> LentPool:
    """Map what a prefill service offers.

    Raises:
        TransportFailed: it is not on this host, or this directory is not the one it uses, or it is gone.
    """
    if not _NAME.fullmatch(offer.name) or len(offer.token) != _TOKEN_BYTES:
        raise TransportFailed("the offer of shared memory is none")
    return await asyncio.to_thread(_borrow, directory, offer)


def _borrow(directory: Path, offer: prefill_pb2.SharedMemory) -> LentPool:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_SECONDS)
        with _inside(directory) as place:
            connection.connect(str(place / offer.name))
        connection.sendall(offer.token)
        _, fds, _, _ = socket.recv_fds(connection, 1, 2)
        if not fds:
            raise TransportFailed("the prefill service did not lend its memory")
        try:
            if not fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise TransportFailed("the lent memory could be taken away while it is read")
            mapped = mmap.mmap(fds[0], 0, prot=mmap.PROT_READ)
            pool = LentPool(connection, mapped, LeaseView(fds[1]) if len(fds) > 1 else None)
        finally:
            for fd in fds:
                os.close(fd)
    except TransportFailed:
        connection.close()
        raise
    except (OSError, ValueError) as error:
        connection.close()
        # Not the path: nobody else is to learn where the memory is.
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise TransportFailed(f"no shared memory with this prefill service: {said}") from None
    connection.setblocking(False)
    return pool


@contextmanager
def _inside(directory: Path) -> Iterator[Path]:
    """The directory by a short name, for the path of a socket holds a hundred bytes only.

    Raises:
        TransportFailed: others may enter it.
        OSError: it is not to be had.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise TransportFailed("the directory for shared memory is open to others: it must be ours alone, mode 0700")
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _sweep(directory: Path) -> None:
    """Remove the sockets of lenders that are gone."""
    for path in directory.iterdir():
        if not _NAME.fullmatch(path.name):
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # alive and busy, or already gone
