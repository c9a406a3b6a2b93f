"""Who may call which method of which service. What is not declared here, nobody may call.

Pure: proving who somebody is is up to `baton.rpc.gate`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


class Who(enum.Flag):
    """Kinds of callers."""

    NOBODY = 0
    CLIENT = enum.auto()
    """Whoever asks a model: an API key, a token, or a certificate that clients have."""
    PEER = enum.auto()
    """Another service of the mesh."""
    OPERATOR = enum.auto()
    """Whoever runs the mesh, on this machine: the operators' port."""
    ANYONE = enum.auto()
    """No credentials are needed."""


_PUBLIC: Final = "baton.v1.Inference"
_HEALTH: Final = "grpc.health.v1.Health"

DECLARED: Final[Mapping[str, Who]] = MappingProxyType(
    {
        f"/{_PUBLIC}/Generate": Who.CLIENT,
        f"/{_PUBLIC}/StreamGenerate": Who.CLIENT,
        f"/{_PUBLIC}/Chat": Who.CLIENT,
        f"/{_PUBLIC}/StreamChat": Who.CLIENT,
        f"/{_PUBLIC}/Tokenize": Who.CLIENT,
        f"/{_PUBLIC}/Detokenize": Who.CLIENT,
        f"/{_PUBLIC}/ListModels": Who.CLIENT,
        f"/{_PUBLIC}/GetModel": Who.CLIENT,
        "/baton.internal.v1.Decode/Generate": Who.PEER,
        "/baton.internal.v1.Prefill/Prefill": Who.PEER,
        "/baton.internal.v1.ResponseCache/Lookup": Who.PEER,
        "/baton.internal.v1.ResponseCache/Fill": Who.PEER,
        "/baton.internal.v1.ResponseCache/Join": Who.PEER,
        "/baton.internal.v1.Worker/Watch": Who.PEER | Who.OPERATOR,
        "/baton.internal.v1.Worker/DebugState": Who.OPERATOR,
        "/baton.internal.v1.CacheAdmin/GetStats": Who.OPERATOR,
        "/baton.internal.v1.CacheAdmin/Flush": Who.OPERATOR,
        "/baton.internal.v1.CacheAdmin/GetEntry": Who.OPERATOR,
        "/baton.internal.v1.Observe/GetRecord": Who.OPERATOR,
        "/baton.internal.v1.Observe/ListRecords": Who.OPERATOR,
        "/baton.internal.v1.Observe/WatchMesh": Who.OPERATOR,
        # The two exceptions: probes and tools come without credentials, and learn nothing but that a service is up,
        # and what its API looks like.
        f"/{_HEALTH}/Check": Who.ANYONE,
        f"/{_HEALTH}/List": Who.ANYONE,
        f"/{_HEALTH}/Watch": Who.ANYONE,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Who.ANYONE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Who.ANYONE,
    }
)
