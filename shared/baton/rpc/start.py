"""The first message of a stream that has to come before all others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, TypeVar

from baton.rpc.errors import InvalidArgument

_SECONDS: Final = 5.0

RequestT = TypeVar("RequestT", bound=Any)


async def receive_start(requests: AsyncIterator[RequestT]) -> RequestT:
    """The first request, whose field `start` of its oneof `message` is set.

    Raises:
        InvalidArgument: it is another one, or does not come.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            first = await anext(requests, None)
    except TimeoutError:
        raise InvalidArgument("start", f"did not come within {_SECONDS:g} s") from None
    if first is None or first.WhichOneof("message") != "start":
        raise InvalidArgument("start", "must be the first message")
    return first
