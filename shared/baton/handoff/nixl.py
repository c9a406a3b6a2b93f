"""NIXL: one-sided reads over whatever UCX finds between two hosts: RDMA, NVLink, shared memory, or TCP. An extra.

The prefill service registers its pool and says over the call how to reach it; the decode service registers its own and
reads from one into the other. https://github.com/ai-dynamo/nixl
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from baton.handoff.receiver import Piece
from baton.handoff.transport import TransportFailed
from baton.internal.v1 import prefill_pb2

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.0002
_PEERS: Final = 64


class _Agent:
    """This process in NIXL's eyes, with its pool registered.

    Raises:
        TransportFailed: NIXL is not installed, or does not start here.
    """

    def __init__(self, memory: memoryview) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise TransportFailed(
                f"NIXL is not installed ({error.name or error}): pip install baton-mesh[nixl]"
            ) from None
        self.name = secrets.token_hex(16)
        self.address = np.frombuffer(memory, np.uint8).ctypes.data
        self.size = len(memory)
        try:
            # Any: the package has no types.
            self.nixl: Any = nixl_agent(self.name, nixl_agent_config(backends=["UCX"]))
            self._registered = self.nixl.register_memory([(self.address, self.size, 0, "")], "DRAM")
        except Exception as error:  # noqa: BLE001 the binding throws what C++ throws
            raise TransportFailed(f"NIXL does not start: {error}") from None

    def close(self) -> None:
        """Let the pool go."""
        self.nixl.deregister_memory(self._registered)


class Lender(_Agent):
    """A pool that others may read.

    Args:
        memory: the pool's bytes, writable as NIXL asks for it.
    """

    def offer(self) -> prefill_pb2.NixlMemory:
        """What a reader must know."""
        metadata: bytes = self.nixl.get_agent_metadata()
        return prefill_pb2.NixlMemory(agent=self.name, metadata=metadata, address=self.address, size=self.size)


class NixlSource:
    """Reads one lender's pool."""

    def __init__(self, reader: Reader, peer: str, address: int, size: int) -> None:
        self._reader = reader
        self._peer = peer
        self._address = address
        self._size = size

    async def read(self, pieces: Sequence[Piece]) -> None:
        """As `baton.handoff.sources.Source.read`. Does not return before nobody writes into the own pool any more."""
        if any(piece.source + piece.size > self._size for piece in pieces):
            raise TransportFailed("the prefill service names memory that it did not lend")
        nixl = self._reader.nixl
        try:
            target = [(self._reader.address + piece.target, piece.size, 0) for piece in pieces]
            source = [(self._address + piece.source, piece.size, 0) for piece in pieces]
            handle = nixl.initialize_xfer(
                "READ", nixl.get_xfer_descs(target, "DRAM"), nixl.get_xfer_descs(source, "DRAM"), self._peer
            )
            state = nixl.transfer(handle)
        except Exception as error:  # noqa: BLE001 the binding throws what C++ throws
            raise TransportFailed(f"NIXL cannot read: {error}") from None
        cancelled: asyncio.CancelledError | None = None
        while state == "PROC":
            try:
                await asyncio.sleep(_POLL_SECONDS)
            except asyncio.CancelledError as error:
                cancelled = error  # the slot is not ours to leave while a read may still write into it
            try:
                state = nixl.check_xfer_state(handle)
            except Exception as error:  # noqa: BLE001 as above
                state = f"ERR {error}"
        nixl.release_xfer_handle(handle)
        if cancelled is not None:
            raise cancelled
        if state != "DONE":
            raise TransportFailed(f"a NIXL read ended in {state}")

    def held(self, lease: prefill_pb2.Lease) -> bool:
        """As `baton.handoff.sources.Source.held`: a lease is not read from here."""
        return False


class Reader(_Agent):
    """Reads lenders' pools into the own one.

    Args:
        memory: the own pool's bytes.
    """

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._peers: OrderedDict[str, str] = OrderedDict()

    async def open(self, offer: prefill_pb2.NixlMemory) -> NixlSource:
        """Meet a lender.

        Raises:
            TransportFailed: it cannot be reached.
        """
        if offer.agent not in self._peers:
            try:
                peer: Any = await asyncio.to_thread(self.nixl.add_remote_agent, offer.metadata)
            except Exception as error:  # noqa: BLE001 the binding throws what C++ throws
                raise TransportFailed(f"NIXL cannot reach the prefill service: {error}") from None
            self._peers[offer.agent] = peer.decode() if isinstance(peer, bytes) else peer
            if len(self._peers) > _PEERS:
                self.nixl.remove_remote_agent(self._peers.popitem(last=False)[1])
        self._peers.move_to_end(offer.agent)
        return NixlSource(self, self._peers[offer.agent], offer.address, offer.size)
