"""What an answer is stored under. Pure.

The canonical form of a key is a sequence of bytes that differs whenever any field differs, whatever the order in which
maps were filled, and whichever protobuf version serialized it: every field that is set, ascending by number, each with
its number, its type, and the length of what follows. So no two keys share a form by what stands next to what.

It is walked by descriptor: a sampling field of tomorrow is part of it without a change here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import xxhash
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from baton.internal.v1 import response_cache_pb2

_DOMAIN: Final = b"baton response cache key, version 1\0"
_PERSON: Final = b"baton-cache-v1"
_TAG_PERSON: Final = b"baton-tenant-v1"

_FORMATS: Final = {
    FieldDescriptor.TYPE_DOUBLE: "d",
    FieldDescriptor.TYPE_FLOAT: "f",
    FieldDescriptor.TYPE_INT64: "q",
    FieldDescriptor.TYPE_SINT64: "q",
    FieldDescriptor.TYPE_SFIXED64: "q",
    FieldDescriptor.TYPE_UINT64: "Q",
    FieldDescriptor.TYPE_FIXED64: "Q",
    FieldDescriptor.TYPE_INT32: "i",
    FieldDescriptor.TYPE_SINT32: "i",
    FieldDescriptor.TYPE_SFIXED32: "i",
    FieldDescriptor.TYPE_ENUM: "i",
    FieldDescriptor.TYPE_UINT32: "I",
    FieldDescriptor.TYPE_FIXED32: "I",
    FieldDescriptor.TYPE_BOOL: "?",
}
"""How `struct` packs the types of fixed size."""


@dataclass(frozen=True, slots=True)
class KeyDigests:
    """The two digests of a key."""

    name: str
    """What its entry is called: the tag of the tenant, "-", and the digest of the key, keyed with secret and tenant."""
    proof: bytes
    """16 bytes of xxh3_128 that the entry carries and is checked against."""


class Keys:
    """Digests of keys, and tags of tenants. Keyed: without the secret they can be neither guessed nor compared.

    Args:
        secret: of the deployment, the same in every cache service; empty: names of different tenants still differ, but
            whoever knows tenant and request can compute them.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = blake2b(secret, person=_PERSON).digest()

    def digests(self, key: response_cache_pb2.CacheKey) -> KeyDigests:
        """Name and proof of a key."""
        form = canonical(key)
        of_tenant = self._of_tenant(key.tenant)
        digest = blake2b(form, digest_size=32, key=of_tenant, person=_PERSON).hexdigest()
        return KeyDigests(name=f"{_tag(of_tenant)}-{digest}", proof=xxhash.xxh3_128_digest(form))

    def tenant_tag(self, tenant: str) -> str:
        """16 hex digits that the names of a tenant's entries begin with."""
        return _tag(self._of_tenant(tenant))

    def _of_tenant(self, tenant: str) -> bytes:
        return blake2b(tenant.encode(), key=self._secret, person=_PERSON).digest()


def _tag(of_tenant: bytes) -> str:
    return blake2b(key=of_tenant, digest_size=8, person=_TAG_PERSON).hexdigest()


def canonical(key: response_cache_pb2.CacheKey) -> bytes:
    """The canonical form of a key."""
    return _DOMAIN + _message(key)


def has_unknown_fields(message: Message) -> bool:
    """Whether the sender knows fields of this message, or of one in it, that this process does not.

    Such a key says more than its canonical form: under it, answers of different requests would be one.
    """
    if len(UnknownFieldSet(message)):
        return True
    return any(has_unknown_fields(inner) for field, value in message.ListFields() for inner in _inner(field, value))


def _inner(field: FieldDescriptor, value: Any) -> Iterable[Message]:
    if field.type != FieldDescriptor.TYPE_MESSAGE:
        return ()
    if not field.is_repeated:
        return (value,)
    return value if _map_entry(field) is None else ()  # our maps hold scalars only


def _message(message: Message) -> bytes:
    parts: list[bytes] = []
    for field, value in message.ListFields():
        body = _repeated(field, value) if field.is_repeated else _single(field, value)
        parts += [struct.pack("<IBQ", field.number, field.type, len(body)), body]
    return b"".join(parts)


def _repeated(field: FieldDescriptor, value: Any) -> bytes:
    if (entry := _map_entry(field)) is not None:
        of_key, of_value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        entries = sorted((_single(of_key, name), _single(of_value, item)) for name, item in value.items())
        return b"".join(_framed(part) for pair in entries for part in pair)
    if field.type in _FORMATS:
        return struct.pack(f"<{len(value)}{_FORMATS[field.type]}", *value)
    return b"".join(_framed(_single(field, item)) for item in value)


def _single(field: FieldDescriptor, value: Any) -> bytes:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return _message(value)
    if field.type == FieldDescriptor.TYPE_STRING:
        return bytes(value.encode())
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes(value)
    return struct.pack(f"<{_FORMATS[field.type]}", value)


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + body


def _map_entry(field: FieldDescriptor) -> Descriptor | None:
    """The message a map is made of; None: it is no map."""
    described = field.message_type
    return described if described is not None and described.GetOptions().map_entry else None
