"""What arrived in time is taken, however late this process looks."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from baton.rpc.patience import patience


async def test_an_answer_that_came_while_the_loop_was_busy_is_taken() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)

    def answer_and_be_busy() -> None:
        theirs.send(b"answer")
        time.sleep(0.05)  # far beyond the timeout

    try:
        asyncio.get_running_loop().call_soon(answer_and_be_busy)
        async with patience(0.01):
            assert await reader.readexactly(6) == b"answer"
    finally:
        writer.close()
        theirs.close()


async def test_silence_ends() -> None:
    with pytest.raises(TimeoutError):
        async with patience(0.01):
            await asyncio.Event().wait()


async def test_nothing_is_left_of_it() -> None:
    async with patience(0.01):
        pass
    await asyncio.sleep(0.05)  # would be cancelled by a timer that goes on


async def test_a_cancel_from_outside_is_none_of_its_business() -> None:
    async def wait() -> None:
        async with patience(60.0):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_time_in_which_we_could_not_look_does_not_count() -> None:
    """The question waits for our loop too, so the answer comes after the timeout, and we are to blame."""
    loop = asyncio.get_running_loop()
    answered = asyncio.Event()
    loop.call_soon(time.sleep, 0.3)
    loop.call_later(0.02, lambda: loop.call_later(0.05, answered.set))  # asked late, answered in half of the time
    async with patience(0.1):
        await answered.wait()
