"""How services call each other: over TLS or not, with the mesh's token or not."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from baton.rpc.mesh_token import MESH_HEADER, Tokens
from baton.rpc.metadata_channel import MetadataChannel
from baton.rpc.reloaded import Reloaded
from baton.rpc.tls import Pems, channel_credentials


class Dialer:
    """Opens channels to other services of the mesh.

    Args:
        pems: CA of those that are called, and our certificate for them; None: no TLS.
        name: that their certificates must bear, where it is not the host of their targets; empty: the host.
        tokens: of the mesh; None: none is sent.
    """

    def __init__(
        self, pems: Reloaded[Pems] | None = None, name: str = "", tokens: Callable[[], Tokens] | None = None
    ) -> None:
        self._pems = pems
        self._name = name
        self._tokens = tokens

    @property
    def version(self) -> int:
        """Differs once channels opened before have outdated certificates."""
        if self._pems is None:
            return 0
        self._pems.get()
        return self._pems.version

    def dial(self, target: str, options: list[tuple[str, int | str]]) -> grpc.aio.Channel:
        """A new channel; the caller closes it.

        Args:
            target: gRPC name, for example "127.0.0.1:4000".
            options: of gRPC.
        """
        if self._pems is None:
            channel = grpc.aio.insecure_channel(target, options=options)
        else:
            named: list[tuple[str, int | str]] = [("grpc.ssl_target_name_override", self._name)] if self._name else []
            credentials = channel_credentials(self._pems.get())
            channel = grpc.aio.secure_channel(target, credentials, options=[*options, *named])
        tokens = self._tokens
        return channel if tokens is None else MetadataChannel(channel, lambda: ((MESH_HEADER, tokens()[0]),))
