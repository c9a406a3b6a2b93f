"""Which server holds what. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from baton_cache.redis_url import Address

SLOTS: Final = int(REDIS_CLUSTER_HASH_SLOTS)


@dataclass(frozen=True, slots=True)
class Layout:
    """Servers by slot.

    Args:
        starts: first slots of ranges, ascending, from 0.
        owners: the server of each range; None: nobody's.
    """

    starts: tuple[int, ...]
    owners: tuple[Address | None, ...]

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.owners)
        assert self.starts[:1] == (0,)

    @classmethod
    def of_one(cls, address: Address) -> Layout:
        """One server has it all."""
        return cls((0,), (address,))

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int, Address]]) -> Layout:
        """Servers with their first and last slot. Where none is named there is none.

        Raises:
            ValueError: two are named for one slot, or there is no such slot.
        """
        starts: list[int] = []
        owners: list[Address | None] = []
        free = 0
        for first, last, address in sorted(ranges, key=lambda each: each[0]):
            if not free <= first <= last < SLOTS:
                raise ValueError("no such slots, or named twice")
            if first > free:
                starts.append(free)
                owners.append(None)
            starts.append(first)
            owners.append(address)
            free = last + 1
        if free < SLOTS:
            starts.append(free)
            owners.append(None)
        return cls(tuple(starts), tuple(owners))

    def owner(self, name: str) -> Address | None:
        """The server that holds a name; None: there is none."""
        if len(self.owners) == 1:
            return self.owners[0]
        return self.owners[bisect_right(self.starts, key_slot(name.encode())) - 1]

    def servers(self) -> frozenset[Address]:
        """All servers."""
        return frozenset(owner for owner in self.owners if owner is not None)


def of_cluster_slots(answer: Sequence[Any], asked: Address) -> Layout:
    """The layout that CLUSTER SLOTS tells.

    Args:
        answer: as Redis gives it: first slot, last slot, master, replicas; a server is host, port, id, more.
        asked: who answered: the host of servers that know no name for themselves.

    Raises:
        ValueError: it is something else.
    """
    try:
        return Layout.of_ranges(
            (int(first), int(last), Address(_text(master[0]) or asked.host, int(master[1])))
            for first, last, master, *_ in answer
        )
    except (TypeError, IndexError, UnicodeDecodeError) as error:
        raise ValueError("not an answer to CLUSTER SLOTS") from error


def of_sentinel(answer: Sequence[Any] | None) -> Layout:
    """The layout that SENTINEL GET-MASTER-ADDR-BY-NAME tells.

    Raises:
        ValueError: there is no such master.
    """
    match answer:
        case [bytes(host), bytes(port)]:
            return Layout.of_one(Address(host.decode(), int(port)))
    raise ValueError("no such master")


def _text(value: Any) -> str:
    if not isinstance(value, bytes | None):
        raise TypeError("not a name")
    return value.decode() if value else ""
