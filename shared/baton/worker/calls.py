"""The calls a front is serving now: what must be empty after quiescence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from baton.rpc.errors import InvalidArgument


class Calls:
    """Live calls by request id."""

    def __init__(self) -> None:
        self._live: set[str] = set()

    @contextmanager
    def track(self, request_id: str) -> Iterator[None]:
        """Count the call as live for the length of the block.

        Raises:
            InvalidArgument: the id is empty, or already live here.
        """
        if not request_id:
            raise InvalidArgument("request_id", "must not be empty")
        if request_id in self._live:
            raise InvalidArgument("request_id", f"{request_id} is already running on this worker")
        self._live.add(request_id)
        try:
            yield
        finally:
            self._live.discard(request_id)

    def ids(self) -> list[str]:
        """Live request ids, sorted."""
        return sorted(self._live)
