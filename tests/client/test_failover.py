"""Several routers: a client that lost one goes on at the next, with the tokens it has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest

from baton.client import Answer, AsyncClient, BatonRpcError, Chunk, Client, Message, Role
from baton.client.failover import PATIENCE_SECONDS, Failover, Routers, split_targets
from baton.rpc.errors import FailedPrecondition, Overloaded
from tests.client.scripted import WORDS, ScriptedServer

UNAVAILABLE = BatonRpcError(grpc.StatusCode.UNAVAILABLE, "gone")

Streamed = tuple[list[Chunk], Answer]
Ask = Callable[[str, str], Streamed]


def ask(target: str, prompt: str) -> Streamed:
    with Client(target) as client, client.stream(prompt, temperature=0.5, request_id="mine") as stream:
        return list(stream), stream.answer


def ask_aio(target: str, prompt: str) -> Streamed:
    async def run() -> Streamed:
        async with AsyncClient(target) as client, client.stream(prompt, temperature=0.5, request_id="mine") as stream:
            return [chunk async for chunk in stream], await stream.answer()

    return asyncio.run(run())


both = pytest.mark.parametrize("asking", [ask, ask_aio], ids=["threads", "asyncio"])


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ScriptedServer()) for _ in range(2)]


def target(servers: list[ScriptedServer]) -> str:
    return ",".join(server.target for server in servers)


@both
@pytest.mark.parametrize("words", [-1, 0, 1, 3, 4])
def test_a_stream_goes_on_at_the_next_router(asking: Ask, words: int, servers: list[ScriptedServer]) -> None:
    first, second = servers
    first.inference.lose_after = words
    chunks, answer = asking(target(servers), "Once")
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert answer.text == "".join(WORDS)
    assert answer.token_ids == (1, 2, 3, 4)
    assert answer.resumes == 1
    assert answer.request_id == "mine"
    (asked,) = second.inference.requests
    assert list(asked.resume_from.ids) == [1, 2, 3, 4][: max(0, words)]
    assert asked.sampling.temperature == 0.5
    assert asked.sampling.HasField("seed") == (words >= 0)
    assert asked.sampling.seed == (7 if words >= 0 else 0), "the seed that the first router drew"
    assert second.inference.metadata[0]["x-request-id"] == "mine"


@both
def test_a_router_that_is_not_there_costs_nothing(asking: Ask, servers: list[ScriptedServer]) -> None:
    chunks, answer = asking(f"127.0.0.1:1,{servers[1].target}", "Once")
    assert (len(chunks), answer.resumes) == (4, 1)


@both
def test_they_may_be_lost_in_turn(asking: Ask, servers: list[ScriptedServer]) -> None:
    """Each gives a word and is gone: as long as there is progress, it goes on."""
    for server in servers:
        server.inference.lose_after = 1
    _, answer = asking(target(servers), "Once")
    assert (answer.text, answer.resumes) == ("".join(WORDS), 4)
    lengths = [[len(request.resume_from.ids) for request in server.inference.requests] for server in servers]
    assert lengths == [[0, 2, 4], [1, 3]]


@both
@pytest.mark.parametrize("error", [Overloaded("full"), FailedPrecondition("no")])
def test_what_another_router_would_say_too_is_final(
    asking: Ask, error: Overloaded | FailedPrecondition, servers: list[ScriptedServer]
) -> None:
    servers[0].inference.lose_after, servers[0].inference.lose_word = 2, error
    with pytest.raises(BatonRpcError) as caught:
        asking(target(servers), "Once")
    assert caught.value.code is error.code
    assert servers[1].inference.requests == []


@both
def test_tokens_that_come_twice_are_refused(asking: Ask, servers: list[ScriptedServer]) -> None:
    with pytest.raises(BatonRpcError, match="token 3 came where 4 was due"):
        asking(servers[0].target, "repeats")


def test_a_whole_answer_is_asked_for_anew_and_who_was_lost_is_not_asked_first(servers: list[ScriptedServer]) -> None:
    servers[0].inference.lose_after = 0
    with Client([server.target for server in servers]) as client:
        assert client.generate("Once").text == "".join(WORDS)
        assert client.chat([Message(Role.USER, "hello")]).text == "HELLO"
        assert [model.name for model in client.models()] == ["tiny"]
    assert [len(server.inference.requests) for server in servers] == [1, 3]


async def test_a_whole_answer_with_asyncio(servers: list[ScriptedServer]) -> None:
    servers[0].inference.lose_after = 0
    async with AsyncClient(target(servers)) as client:
        assert (await client.generate("Once")).text == "".join(WORDS)
    assert [len(server.inference.requests) for server in servers] == [1, 1]


def test_closing_ends_it_wherever_it_is(servers: list[ScriptedServer]) -> None:
    first, second = servers
    first.inference.lose_after = -1
    with Client(target(servers)) as client:
        stream = client.stream("hang")
        assert next(stream).text == WORDS[0]
        closer = threading.Timer(0.1, stream.close)
        closer.start()
        with pytest.raises(BatonRpcError, match="CANCELLED"):
            next(stream)
        assert second.inference.cancelled.wait(10)
    assert len(first.inference.requests) == 1, "a stream that was closed is not resumed"


@pytest.mark.parametrize("way", ["stream", "whole"])
def test_closing_the_client_ends_what_another_thread_waits_for(way: str, servers: list[ScriptedServer]) -> None:
    client = Client(target(servers))
    caught: list[BaseException] = []

    def read() -> None:
        try:
            _ = client.stream("hang").answer if way == "stream" else client.generate("hang")
        except (BatonRpcError, ValueError) as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert servers[0].inference.hanging.wait(10)
    client.close()
    reader.join(10)
    (error,) = caught
    assert isinstance(error, BatonRpcError)
    assert error.code is grpc.StatusCode.CANCELLED
    assert servers[1].inference.requests == []


def test_a_stream_can_be_resumed_by_hand(servers: list[ScriptedServer]) -> None:
    with Client(servers[0].target) as client:
        with client.stream("Once", seed=7, resume_from=[1, 2]) as stream:
            assert [chunk.index for chunk in stream] == [2, 3]
        with pytest.raises(ValueError, match="resume_from"):
            client.generate("Once", resume_from=[1, 2])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_all_are_asked_before_it_waits_and_waiting_ends() -> None:
    clock = Clock()
    failover = Failover(Routers(3), None, clock)
    asked, pauses = [failover.router], []
    with suppress(BatonRpcError):
        while len(pauses) < 100:
            pauses.append(failover.lost(UNAVAILABLE))
            clock.now += pauses[-1]
            asked.append(failover.router)
    assert asked[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert pauses[:7] == [0, 0, 0.1, 0, 0, 0.2, 0]
    assert max(pauses) == 0.5
    assert PATIENCE_SECONDS - 0.5 <= clock.now - 100 <= PATIENCE_SECONDS


def test_progress_begins_the_patience_anew() -> None:
    clock = Clock()
    failover = Failover(Routers(2), None, clock)
    for _ in range(10):
        assert failover.lost(UNAVAILABLE) == 0
        failover.progressed()
        clock.now += PATIENCE_SECONDS
    assert failover.moves == 10


def test_a_router_that_was_at_work_for_long_begins_the_patience_anew() -> None:
    """As of an answer in one piece, of which nothing is seen before its end."""
    clock = Clock()
    failover = Failover(Routers(2), None, clock)
    for _ in range(3):
        assert failover.lost(UNAVAILABLE) == 0
        clock.now += 60
    with pytest.raises(BatonRpcError):
        failover.lost(UNAVAILABLE)
    failover = Failover(Routers(2), None, clock)
    failover.lost(UNAVAILABLE)
    clock.now += 60
    failover.lost(UNAVAILABLE)
    clock.now += PATIENCE_SECONDS
    with pytest.raises(BatonRpcError):
        failover.lost(UNAVAILABLE)


def test_the_deadline_is_one_for_all_routers() -> None:
    clock = Clock()
    failover = Failover(Routers(2), 3.0, clock)
    clock.now += 1
    assert failover.timeout() == 2.0
    failover.lost(UNAVAILABLE)
    clock.now += 2.5
    assert failover.timeout() == 0.0
    with pytest.raises(BatonRpcError):
        failover.lost(UNAVAILABLE)


def test_one_router_is_asked_once() -> None:
    with pytest.raises(BatonRpcError):
        Failover(Routers(1), None).lost(UNAVAILABLE)


def test_targets() -> None:
    assert split_targets(" a:1, b:2,a:1,") == ("a:1", "b:2")
    assert split_targets(["a:1", "b:2"]) == ("a:1", "b:2")
    with pytest.raises(ValueError, match="target"):
        split_targets(" , ")
