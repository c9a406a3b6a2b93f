"""The latest requests, bounded: what `baton trace` and `baton top` look at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from baton_router.record import Record


class Records:
    """A ring of records by request id. The oldest goes when a new one comes; of two with one id the later stays.

    Args:
        limit: records kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: OrderedDict[str, Record] = OrderedDict()

    def add(self, record: Record) -> None:
        """Keep a record of a request that is over."""
        self._records.pop(record.request_id, None)
        self._records[record.request_id] = record
        while len(self._records) > self._limit:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> Record | None:
        """The record of a request; None: it is not here, or not any more."""
        return self._records.get(request_id)

    def latest(self) -> Iterator[Record]:
        """All of them, the latest first."""
        return reversed(self._records.values())
