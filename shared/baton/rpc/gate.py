"""The gate of a port: what credentials a call has, who that makes of its caller, and whether the method is for them.

Default-deny: a method that `baton.rpc.access` does not declare is for nobody, and credentials that are not known here
are worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from baton.rpc.access import DECLARED, Who
from baton.rpc.caller import ANONYMOUS, Caller
from baton.rpc.errors import PermissionDenied, Unauthenticated
from baton.rpc.mesh_token import MESH_HEADER, Tokens, is_one_of

_AUTHORIZATION: Final = "authorization"
_BEARER: Final = "bearer "

Metadata = Iterable[tuple[str, str | bytes]]
Verify = Callable[[str], Caller | None]
"""Who has this credential; None: nobody."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the metadata of a call prove."""

    who: Who
    caller: Caller = ANONYMOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Who comes through at one port.

    Attributes:
        anonymous: what callers are whose metadata hold no credentials. Where a certificate is asked for and enough, the
            handshake has seen one: what it makes of them.
        clients: verify what comes as `authorization: Bearer`; the first that knows it decides.
        peers: tokens of the mesh; None: there are none.
        operators: tokens of operators, as `authorization: Bearer`; None: there are none.
        declared: who may call which method.
        names: of which a caller's certificate must have one; empty: any will do.
        tenant_of: the caller that a certificate's common name stands for, None for nobody; unset: it is not looked at.
    """

    anonymous: Who
    clients: Sequence[Verify] = ()
    peers: Callable[[], Tokens] | None = None
    operators: Callable[[], Tokens] | None = None
    declared: Mapping[str, Who] = field(default_factory=lambda: DECLARED)
    names: frozenset[str] = frozenset()
    tenant_of: Verify | None = None

    @property
    def reads_certificates(self) -> bool:
        """Whether a caller's certificate matters beyond having one."""
        return bool(self.names) or self.tenant_of is not None

    def identify(self, metadata: Metadata) -> Identity:
        """Who calls, as far as the metadata say.

        Raises:
            Unauthenticated: they hold credentials that are not known here.
        """
        who, caller = self.anonymous, ANONYMOUS
        seen = set()
        for key, value in metadata:
            if key not in (_AUTHORIZATION, MESH_HEADER):
                continue
            if key in seen:
                raise Unauthenticated(f"the {key} metadata comes more than once")
            seen.add(key)
            if not isinstance(value, str):
                raise Unauthenticated(f"the {key} metadata is not text")
            if key == MESH_HEADER:
                who |= self._peer(value)
            else:
                also, caller = self._bearer(value)
                who |= also
        return Identity(who, caller)

    def examine(self, method: str, metadata: Metadata) -> Identity:
        """Who calls, if the metadata let the call through.

        Raises:
            Unauthenticated: credentials are missing, or not known here.
            PermissionDenied: they are of somebody whom the method is not for.
        """
        wanted = self.declared.get(method, Who.NOBODY)
        if wanted is Who.NOBODY:
            raise PermissionDenied(f"{method} is for nobody")
        if Who.ANYONE in wanted:
            return Identity(Who.ANYONE)
        identity = self.identify(metadata)
        if identity.who & wanted:
            return identity
        if identity.who is Who.NOBODY:
            raise Unauthenticated("credentials are needed: metadata `authorization: Bearer KEY`, or those of the mesh")
        raise PermissionDenied(f"{method} is not for this kind of caller")

    def admit(self, identity: Identity, certificate: Mapping[str, Iterable[bytes]]) -> Caller:
        """The caller of a call that `examine` let through, now that its connection can be asked for a certificate.

        Args:
            identity: what `examine` returned.
            certificate: gRPC's auth context of the connection.

        Raises:
            PermissionDenied: the certificate is of somebody whom the method is not for.
        """
        if Who.ANYONE in identity.who:
            return identity.caller
        if self.names and not self.names & set(_texts(certificate, "x509_subject_alternative_name")):
            raise PermissionDenied("the certificate has none of the names that are let in here")
        if self.tenant_of is None:
            return identity.caller
        for common_name in _texts(certificate, "x509_common_name"):
            caller = self.tenant_of(common_name)
            if caller is not None:
                return caller
        raise PermissionDenied("the certificate's common name is not a tenant's")

    def _peer(self, token: str) -> Who:
        if self.peers is None:
            return Who.NOBODY  # nobody asked for one: callers may be told theirs before we are
        if not is_one_of(token, self.peers()):
            raise Unauthenticated("the mesh token is not known here")
        return Who.PEER

    def _bearer(self, value: str) -> tuple[Who, Caller]:
        if self.operators is None and not self.clients:
            return Who.NOBODY, ANONYMOUS
        if value[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated("the authorization metadata is not `Bearer` and a key or token")
        credential = value[len(_BEARER) :].strip()
        if self.operators is not None and is_one_of(credential, self.operators()):
            return Who.OPERATOR, ANONYMOUS
        for verify in self.clients:
            caller = verify(credential)
            if caller is not None:
                return Who.CLIENT, caller
        raise Unauthenticated("the key or token is not known here, or no longer valid")


def _texts(certificate: Mapping[str, Iterable[bytes]], key: str) -> Iterator[str]:
    return (value.decode(errors="replace") for value in certificate.get(key, ()))


OPEN: Final = Gate(anonymous=Who.CLIENT | Who.PEER | Who.OPERATOR)
"""Lets everybody do what is declared for anybody: for servers inside of a test."""
