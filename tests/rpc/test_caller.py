"""Who makes a call."""

from __future__ import annotations

import asyncio

from baton.rpc.caller import ANONYMOUS, Caller, calling_as, current_caller


async def test_a_caller_holds_for_the_block_and_for_the_tasks_started_in_it() -> None:
    async def look() -> Caller:
        await asyncio.sleep(0)
        return current_caller()

    with calling_as(Caller("acme", "ann")):
        task = asyncio.create_task(look())
        assert current_caller().tenant == "acme"
    assert current_caller() is ANONYMOUS
    assert await task == Caller("acme", "ann")
    assert await look() == Caller(tenant="", subject="")
