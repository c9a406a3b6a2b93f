"""Workers that die, hang, refuse, or break: the stream goes on elsewhere, or ends in an honest status in time."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton.internal.v1 import worker_pb2
from baton.rpc.errors import reason_of
from baton.v1 import inference_pb2, sampling_pb2
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker, text_at, token_at
from tests.router.test_stream import ask, check_indices, collect


def check_whole(messages: list[inference_pb2.StreamGenerateResponse], tokens: int = 40) -> inference_pb2.Summary:
    """Start, every token once and in order, summary."""
    chunks = [message.chunk for message in messages[1:-1]]
    check_indices(chunks)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == [token_at(i) for i in range(tokens)]
    assert "".join(chunk.text for chunk in chunks) == "".join(text_at(i) for i in range(tokens))
    return messages[-1].summary


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    found: dict[str, object] = {}
    for kind in (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo, error_details_pb2.RequestInfo):
        for packed in status.details:
            box = kind()
            if packed.Unpack(box):
                found[kind.__name__] = box
    return found


async def two_workers(stack: AsyncExitStack, model: Path) -> list[ScriptedWorker]:
    return [await stack.enter_async_context(ScriptedWorker.running(model)) for _ in range(2)]


def addresses(workers: list[ScriptedWorker]) -> str:
    return ",".join(worker.address for worker in workers)


@pytest.mark.parametrize("after", [0, 1, 17])
async def test_killed_worker_migrates(router_model: Path, after: int) -> None:
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        for worker in workers:
            worker.pause = 0.005
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        call = aiter(router.stub.StreamGenerate(ask(40)))
        messages = [await anext(call)]
        await eventually(lambda: any(worker.live for worker in workers))
        while len(messages) <= after:
            messages.append(await anext(call))
        victim, other = sorted(workers, key=lambda worker: -worker.live)
        await victim.kill()
        summary = check_whole(await collect(call, messages))
        assert summary.migrations == 1
        (retried,) = other.requests
        assert retried.sampling.seed == victim.requests[0].sampling.seed == 5
        assert list(retried.delivered_token_ids) == [token_at(i) for i in range(len(retried.delivered_token_ids))]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
@pytest.mark.parametrize("after", [0, 3])
async def test_failing_worker_is_left(router_model: Path, code: grpc.StatusCode, after: int) -> None:
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        workers[0].fail, workers[0].fail_after = code, after
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        for _ in range(6):  # the first choice is by chance
            check_whole(await collect(router.stub.StreamGenerate(ask(40))))
        assert len(workers[1].requests) == 6


async def test_hung_worker_is_left(router_model: Path) -> None:
    """The connection stays up and says nothing: its state stream's silence gives it away."""
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        workers[0].hang_after = 5
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=addresses(workers), worker_silence_seconds=0.4)
        )
        migrations = 0
        for _ in range(8):
            before = time.monotonic()
            migrations += check_whole(await collect(router.stub.StreamGenerate(ask(40)))).migrations
            assert time.monotonic() - before < 2
        assert migrations == 1, "after that it is known"
        await eventually(lambda: workers[0].live == 0)


async def test_lost_last_word_adds_no_token(router_model: Path) -> None:
    """All tokens came, the worker's Finished did not: the answer is complete, not continued."""
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        for worker in workers:
            worker.fail, worker.finish_first = grpc.StatusCode.UNAVAILABLE, True
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        summary = check_whole(await collect(router.stub.StreamGenerate(ask(40))))
        assert summary.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
        assert summary.usage.completion_tokens == 40
        assert sum(len(worker.requests) for worker in workers) == 1


async def test_no_worker_is_unavailable_within_a_second(router_model: Path) -> None:
    async with running_router(router_model, decode_targets="127.0.0.1:1") as router:
        before = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
        assert time.monotonic() - before < 1
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        found = details(caught.value)
        assert {"RetryInfo", "ErrorInfo", "RequestInfo"} == set(found)
        assert not (await router.stub.GetModel(inference_pb2.GetModelRequest())).model.ready


async def test_only_worker_lost_in_mid_stream(router: Router, worker: ScriptedWorker) -> None:
    worker.pause = 0.01
    call = aiter(router.stub.StreamGenerate(ask(100)))
    for _ in range(5):
        await anext(call)
    await worker.kill()
    before = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert time.monotonic() - before < 1
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    info = details(caught.value)["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("WORKER_LOST", "baton")


async def test_worker_back_in_time_goes_on(router_model: Path) -> None:
    """The only worker is replaced within the re-attach window, at the same address: the stream goes on."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(ScriptedWorker.running(router_model))
        first.pause = 0.01
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=first.address, reattach_seconds=4)
        )
        call = aiter(router.stub.StreamGenerate(ask(40)))
        messages = [await anext(call) for _ in range(5)]
        await first.kill()
        await asyncio.sleep(0.2)
        await stack.enter_async_context(ScriptedWorker.running(router_model, listen=first.address))
        assert check_whole(await collect(call, messages)).migrations == 1


async def test_breaking_two_workers_is_enough(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(ScriptedWorker.running(router_model)) for _ in range(3)]
        for worker in workers:
            worker.fail = grpc.StatusCode.INTERNAL
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert reason_of(caught.value) == "POISON_REQUEST", "nobody is told to try that again"
        assert sum(len(worker.requests) for worker in workers) == 2


async def test_a_poison_is_tried_twice_and_takes_nobody_along(router_model: Path) -> None:
    """It kills the engine it runs on; those that were computed with it are tried one by one, and all finish."""
    poison = 77
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(ScriptedWorker.running(router_model)) for _ in range(4)]
        for worker in workers:
            worker.poison, worker.pause = poison, 0.02
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        mates = [asyncio.create_task(collect(router.stub.StreamGenerate(ask(40)))) for _ in range(12)]
        await eventually(lambda: sum(worker.live for worker in workers) == 12)
        bad = ask(40)
        bad.ClearField("prompt")
        bad.token_ids.ids.extend([poison, 50, 51])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(router.stub.StreamGenerate(bad))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert reason_of(caught.value) == "POISON_REQUEST"
        for mate in mates:
            check_whole(await mate)
        assert sum(worker.dead.is_set() for worker in workers) == 2
        tries = [request for worker in workers for request in worker.requests if request.token_ids[0] == poison]
        assert [request.suspect for request in tries] in ([False, True], [True, False])
        assert any(r.suspect for worker in workers for r in worker.requests if r.token_ids[0] != poison)


async def test_refusals_are_retried_within_a_budget(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        for worker in workers:
            worker.fail = grpc.StatusCode.RESOURCE_EXHAUSTED
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=addresses(workers), retry_share=0.0)
        )
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # The first ten requests asked both workers, as far as the reserve of ten reached, the others one.
        assert 30 - 5 <= sum(len(worker.requests) for worker in workers) <= 30


async def test_a_worker_that_was_only_out_of_reach_is_used_again(router_model: Path) -> None:
    """Both are lost to a request in turn; the first one is back when the second one goes."""
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        for worker in workers:
            worker.pause = 0.01
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=addresses(workers), reattach_seconds=3)
        )
        call = aiter(router.stub.StreamGenerate(ask(100)))
        messages = [await anext(call) for _ in range(5)]
        for _ in range(3):
            victim = next(worker for worker in workers if worker.live)
            victim.cut.set()
            messages += [await anext(call) for _ in range(10)]
            victim.cut.clear()
        assert check_whole(await collect(call, messages), 100).migrations == 3


async def test_full_everywhere_is_resource_exhausted(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        for worker in workers:
            worker.fail = grpc.StatusCode.RESOURCE_EXHAUSTED
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses(workers)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.stub.Generate(inference_pb2.GenerateRequest(text="fox"))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "RetryInfo" in details(caught.value)


def other_tokenizer(worker: ScriptedWorker) -> None:
    worker.state.model.tokenizer_digest = "other"


def draining(worker: ScriptedWorker) -> None:
    worker.state.draining = True


def other_model(worker: ScriptedWorker) -> None:
    worker.state.model.fingerprint = "model-2"


def wrong_role(worker: ScriptedWorker) -> None:
    worker.state.role = worker_pb2.WORKER_ROLE_PREFILL


@pytest.mark.parametrize("change", [other_tokenizer, draining, other_model, wrong_role])
async def test_unfit_workers_are_not_used(router_model: Path, change: object) -> None:
    async with AsyncExitStack() as stack:
        good = await two_workers(stack, router_model)
        bad = await stack.enter_async_context(ScriptedWorker.running(router_model, change=change))  # type: ignore[arg-type]
        router = await stack.enter_async_context(running_router(router_model, decode_targets=addresses([bad, *good])))
        await asyncio.sleep(0.1)
        for _ in range(6):
            await collect(router.stub.StreamGenerate(ask(2)))
        assert bad.requests == []


async def test_load_is_spread_and_prefill_offered(router_model: Path) -> None:
    async with AsyncExitStack() as stack:
        workers = await two_workers(stack, router_model)
        prefill = [
            await stack.enter_async_context(ScriptedWorker.running(router_model, role=worker_pb2.WORKER_ROLE_PREFILL))
            for _ in range(2)
        ]
        for worker in workers:
            worker.pause = 0.02
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=addresses(workers), prefill_targets=addresses(prefill))
        )
        await asyncio.sleep(0.1)
        await asyncio.gather(*(collect(router.stub.StreamGenerate(ask(5))) for _ in range(10)))
        assert [len(worker.requests) for worker in workers] == [5, 5]
        firsts = {request.prefill_candidates[0].target for worker in workers for request in worker.requests}
        assert firsts == {worker.address for worker in prefill}
        assert all(len(request.prefill_candidates) == 2 for worker in workers for request in worker.requests)


async def test_names_are_resolved(router_model: Path, worker: ScriptedWorker) -> None:
    port = worker.address.rpartition(":")[2]
    async with running_router(router_model, decode_targets=f"dns:///localhost:{port}") as router:
        check_whole(await collect(router.stub.StreamGenerate(ask(40))))
