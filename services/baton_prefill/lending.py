"""What a prefill service offers besides the call itself for its KV to be fetched by."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from baton.engine.client import EngineClient
from baton.handoff import nixl, shm
from baton.handoff.leases import LeaseTable
from baton.handoff.transport import Transport, TransportChoice, TransportFailed, shared
from baton.internal.v1 import prefill_pb2
from baton.rpc.service import CannotStart
from baton.v1 import inference_pb2

log = logging.getLogger(__name__)


class Offers:
    """What each call's PrefillAccepted says of transports.

    Args:
        everything: all that this service offers.
        leases: lent with the pool.
    """

    def __init__(self, everything: prefill_pb2.PrefillAccepted, leases: LeaseTable) -> None:
        self._everything = everything
        self._leases = leases

    @contextmanager
    def to(self, wanted: Iterable[Transport], mapped_memory: str) -> Iterator[prefill_pb2.PrefillAccepted]:
        """For a caller that knows these transports, the one it wants first, and may have a pool mapped already.

        The call's KV counts as held as long as the block lasts.
        """
        transports = shared(wanted, self._everything.transports)
        accepted = prefill_pb2.PrefillAccepted(transports=transports)
        if inference_pb2.TRANSPORT_SHM in transports:
            accepted.shared_memory.CopyFrom(self._everything.shared_memory)
        if inference_pb2.TRANSPORT_NIXL in transports:
            accepted.nixl.CopyFrom(self._everything.nixl)
        with ExitStack() as stack:
            if inference_pb2.TRANSPORT_SHM in transports:
                if mapped_memory == accepted.shared_memory.name:
                    accepted.chosen = inference_pb2.TRANSPORT_SHM
                if (lease := stack.enter_context(self._leases.hold())) is not None:
                    accepted.lease.CopyFrom(lease)
            yield accepted


@asynccontextmanager
async def lending(choice: TransportChoice, shm_dir: Path, engine: EngineClient) -> AsyncIterator[Offers]:
    """Lend the engine's pool in every way the choice allows, as long as the block lasts.

    Raises:
        CannotStart: the one way that is allowed is not to be had here.
    """
    everything = prefill_pb2.PrefillAccepted()
    leases = LeaseTable()
    async with AsyncExitStack() as stack:
        stack.callback(leases.close)

        async def by_shm() -> None:
            lent = shm.lending(shm_dir, engine.memory_fd, leases)
            everything.shared_memory.CopyFrom(await stack.enter_async_context(lent))

        async def by_nixl() -> None:
            lender = nixl.Lender(engine.memory)
            stack.callback(lender.close)
            everything.nixl.CopyFrom(lender.offer())

        async def by_call() -> None:
            pass

        ways = {
            inference_pb2.TRANSPORT_SHM: by_shm,
            inference_pb2.TRANSPORT_NIXL: by_nixl,
            inference_pb2.TRANSPORT_GRPC: by_call,
        }
        for transport in choice.transports:
            try:
                await ways[transport]()
            except TransportFailed as error:
                if choice is not TransportChoice.AUTO:
                    raise CannotStart(f"--transport {choice}: {error}") from None
                log.info("transport not offered: %s", error)
            else:
                everything.transports.append(transport)
        yield Offers(everything, leases)
