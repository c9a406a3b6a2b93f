"""Which way KV takes: what a service is told to use, what both ends share, and what is fastest of it. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from typing import Final, TypeAlias

from baton.v1 import inference_pb2

Transport: TypeAlias = inference_pb2.Transport.ValueType

FASTEST_FIRST: Final[tuple[Transport, ...]] = (
    inference_pb2.TRANSPORT_SHM,
    inference_pb2.TRANSPORT_NIXL,
    inference_pb2.TRANSPORT_GRPC,
)


class TransportChoice(enum.StrEnum):
    """What a service is told to use."""

    AUTO = "auto"  # the fastest that both ends prove to share, and the next one if it fails
    GRPC = "grpc"
    SHM = "shm"
    NIXL = "nixl"

    @property
    def transports(self) -> tuple[Transport, ...]:
        """Those it allows, the fastest first."""
        return FASTEST_FIRST if self is TransportChoice.AUTO else (_FORCED[self],)


_FORCED: Final = {
    TransportChoice.GRPC: inference_pb2.TRANSPORT_GRPC,
    TransportChoice.SHM: inference_pb2.TRANSPORT_SHM,
    TransportChoice.NIXL: inference_pb2.TRANSPORT_NIXL,
}


class TransportFailed(Exception):
    """A transport cannot be used with this peer, or not any more. Another one can; the message is fit for a log."""


def name(transport: int) -> str:
    """What logs, metrics and spans call it: grpc, shm, nixl; empty when KV did not travel."""
    if transport == inference_pb2.TRANSPORT_UNSPECIFIED:
        return ""
    return inference_pb2.Transport.Name(transport).removeprefix("TRANSPORT_").lower()  # type: ignore[arg-type]


def needs_choice(offered: Sequence[int]) -> bool:
    """Whether the caller has to choose: not if only the call itself is offered, so that KV does not wait for it."""
    return list(offered) != [inference_pb2.TRANSPORT_GRPC]


def shared(wanted: Iterable[int], offered: Collection[int]) -> list[Transport]:
    """What is wanted and offered, the most wanted first; what this version does not know is left out."""
    return [transport for transport in dict.fromkeys(wanted) if transport in offered and transport in FASTEST_FIRST]  # type: ignore[misc]
