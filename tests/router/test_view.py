"""The live view: what workers tell of their prefixes, gaps, several models, and workers of another release."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY

from baton import __version__
from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2
from baton.rpc.channel import ChannelPool
from baton.text.model import TextModel
from baton.v1 import inference_pb2, sampling_pb2
from baton.worker.digests import BlockDigests
from baton.worker.protocol import PROTOCOL
from baton_router import workers as workers_module
from baton_router.fitness import Refusal, Unfit
from baton_router.models import Models
from baton_router.prefixes import Gap, KnownPrefixes
from baton_router.workers import Unused, WorkerView
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker
from tests.text.conftest import write_text_model

BLOCK = 16


def changes(sequence: int, added: tuple[int, ...] = (), removed: tuple[int, ...] = ()) -> worker_pb2.PrefixChanges:
    return worker_pb2.PrefixChanges(
        sequence=sequence, snapshot=sequence == 1, block_tokens=BLOCK, added=added, removed=removed
    )


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_known_prefixes() -> None:
    known = KnownPrefixes()
    assert not known.told
    known.take(changes(1, (1, 2, 3, 4)), 100)
    known.take(changes(2, (5, 6), (4,)), 100)
    assert [known.depth(chain) for chain in ([1, 2, 3, 4], [1, 9], [9, 8], [], [1, 2, 3])] == [3, 1, 0, 0, 3]
    with pytest.raises(Gap, match="4 follow 2"):
        known.take(changes(4), 100)
    known.take(changes(1, (7,)), 100)
    assert (len(known), known.depth([7])) == (1, 1)
    known.take(changes(2, tuple(range(20, 200))), 100)
    assert len(known) == 100, "no worker has more blocks than room for them"


def prompt_of(tokens: int) -> list[int]:
    return [50 + i % 300 for i in range(tokens)]


async def send(router: Router, tokens: int, *, salt: str = "", model: str = "") -> None:
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=sampling_pb2.TokenIds(ids=prompt_of(tokens)),
        sampling=sampling_pb2.SamplingParams(max_tokens=2, temperature=0),
    )
    request.cache_control.cache_salt = salt
    await router.stub.Generate(request)


async def mesh_of(router: Router) -> observe_pb2.WatchMeshResponse:
    async with grpc.aio.insecure_channel(router.address) as channel:
        async for state in observe_pb2_grpc.ObserveStub(channel).WatchMesh(observe_pb2.WatchMeshRequest()):
            return state
    raise AssertionError("no state")


@pytest.fixture
async def three(router_model: Path) -> AsyncIterator[list[ScriptedWorker]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedWorker.running(router_model)) for _ in range(3)]


def addresses(workers: list[ScriptedWorker]) -> str:
    return ",".join(worker.address for worker in workers)


async def test_a_request_goes_where_its_prefix_is_and_no_other_salt_does(
    router_model: Path, three: list[ScriptedWorker]
) -> None:
    holder = three[1]
    holder.cached = [(b"", prompt_of(64))]
    async with running_router(router_model, decode_targets=addresses(three)) as router:
        await eventually(lambda: all(worker.prefix_keys for worker in three))
        assert len({key for worker in three for key in worker.prefix_keys}) == 1
        await eventually(lambda: value("baton_router_prefix_blocks", tier="decode") == 4)
        await eventually(lambda: value("baton_workers", tier="decode") == 3)
        for _ in range(6):
            await send(router, 70)
        assert [len(worker.requests) for worker in three] == [0, 6, 0]
        for i in range(30):
            await send(router, 70, salt=f"another {i}")
        assert len(holder.requests) < 36
        assert {worker.prefix_blocks for worker in (await mesh_of(router)).workers} == {0, 4}


async def test_a_gap_is_made_good_without_losing_the_worker(
    router_model: Path, three: list[ScriptedWorker], caplog: pytest.LogCaptureFixture
) -> None:
    holder = three[2]
    holder.cached = [(b"", prompt_of(64))]
    resyncs = value("baton_router_prefix_resyncs_total")
    async with running_router(router_model, decode_targets=addresses(three)) as router:
        await eventually(lambda: value("baton_router_prefix_blocks", tier="decode") == 4)
        await eventually(lambda: value("baton_workers", tier="decode") == 3)
        with caplog.at_level(logging.INFO):
            holder.skip_sequence = True
            holder.cached.append((b"", [7, *prompt_of(31)]))
            await eventually(lambda: len(holder.prefix_keys) == 2)
            await eventually(lambda: value("baton_router_prefix_blocks", tier="decode") == 6)
        assert value("baton_router_prefix_resyncs_total") == resyncs + 1
        assert not [record for record in caplog.records if record.getMessage() == f"decode {holder.address} is there"]
        for _ in range(4):
            await send(router, 70)
        assert len(holder.requests) == 4
    assert value("baton_router_prefix_blocks", tier="decode") == 0


@pytest.mark.parametrize("routing", ["hash", "load"])
async def test_without_prefixes_nobody_is_asked_to_tell(
    router_model: Path, three: list[ScriptedWorker], routing: str
) -> None:
    async with running_router(router_model, decode_targets=addresses(three), routing=routing) as router:
        for _ in range(9):
            await send(router, 70)
        assert not any(worker.prefix_keys for worker in three)
        used = [len(worker.requests) for worker in three]
        assert sorted(used)[:2] == [0, 0] if routing == "hash" else sum(used) == 9


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1])
async def test_a_worker_of_another_protocol_is_told_and_not_used(
    router_model: Path, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture, protocol: int
) -> None:
    def change(other: ScriptedWorker) -> None:
        other.state.protocol, other.state.version = protocol, "9.8.7"

    async with ScriptedWorker.running(router_model, change=change) as other:
        async with running_router(router_model, decode_targets=addresses([other, worker])) as router:
            await eventually(lambda: value("baton_unused_workers", tier="decode", reason="protocol") == 1)
            for _ in range(3):
                await send(router, 20)
            assert (len(other.requests), len(worker.requests)) == (0, 3)
            state = await mesh_of(router)
            assert [seen.target for seen in state.workers] == [worker.address]
            assert [(u.target, u.reason) for u in state.unused] == [(other.address, "protocol")]
            said = state.unused[0].message
            await asyncio.sleep(0.2)
        complaints = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
        assert complaints == [f"decode {other.address} is not used: {said}"]
        for version, number in (("9.8.7", protocol), (__version__, PROTOCOL)):
            assert f"Baton {version} with internal protocol {number}" in said


async def test_workers_come_and_go(router_model: Path, worker: ScriptedWorker) -> None:
    async with AsyncExitStack() as stack:
        late = await stack.enter_async_context(ScriptedWorker.running(router_model))
        port = late.address.rpartition(":")[2]
        await late.kill()
        router = await stack.enter_async_context(
            running_router(router_model, decode_targets=f"{worker.address},{late.address}")
        )
        assert value("baton_workers", tier="decode") == 1
        async with ScriptedWorker.running(router_model, listen=f"127.0.0.1:{port}"):
            await eventually(lambda: value("baton_workers", tier="decode") == 2, 10.0)
        await eventually(lambda: value("baton_workers", tier="decode") == 1, 10.0)
        await send(router, 20)


class Names:
    """A name server: the addresses of a name, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
        self.names = names
        self.looks = 0
        monkeypatch.setattr("baton_router.workers.resolve_target", self._resolve)

    async def _resolve(self, target: str) -> list[str]:
        self.looks += 1
        return self.names[target.removeprefix("dns:///").partition(":")[0]]

    async def say(self, name: str, addresses: list[str]) -> None:
        """From now on, and wait until the router must know."""
        self.names[name] = addresses
        seen = self.looks + 2 * len(self.names)
        await eventually(lambda: self.looks > seen)


@pytest.mark.parametrize("leaves", ["a", "b"])
async def test_an_address_of_two_names_stays_while_one_has_it(
    router_model: Path, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, leaves: str
) -> None:
    names = Names(monkeypatch, a=[worker.address], b=[worker.address])
    targets = "dns:///a:1,dns:///b:1"
    async with running_router(router_model, decode_targets=targets, resolve_seconds=0.05) as router:
        await eventually(lambda: len(worker.prefix_keys) == 2)
        await eventually(lambda: value("baton_workers", tier="decode") == 1)
        await names.say(leaves, [])
        await eventually(lambda: value("baton_workers", tier="decode") == 1)
        await send(router, 20)
        await names.say("b" if leaves == "a" else "a", [])
        await eventually(lambda: value("baton_workers", tier="decode") == 0)
    assert value("baton_router_prefix_blocks", tier="decode") == 0


@pytest.mark.parametrize("spoke", [True, False])
async def test_what_began_before_a_worker_left_the_view_ends_when_it_is_silent(
    router_model: Path, three: list[ScriptedWorker], monkeypatch: pytest.MonkeyPatch, spoke: bool
) -> None:
    held, other, _ = three
    held.gate.clear()
    names = Names(monkeypatch, a=[held.address])
    settings = {"decode_targets": "dns:///a:1", "resolve_seconds": 0.05, "worker_silence_seconds": 1.0}
    async with running_router(router_model, **settings) as router:  # type: ignore[arg-type]
        await eventually(lambda: value("baton_workers", tier="decode") == 1)
        sending = asyncio.create_task(send(router, 20))
        await eventually(lambda: held.live == 1)
        await names.say("a", [other.address])
        if spoke:
            await names.say("a", [held.address, other.address])
            await eventually(lambda: value("baton_workers", tier="decode") == 2)
        held.hanging.set()
        await names.say("a", [held.address, other.address])
        assert not sending.done()
        await asyncio.wait_for(sending, 20)
        await eventually(lambda: held.live == 0)
    assert (len(held.requests), len(other.requests)) == (1, 1)


async def test_several_models_behind_one_router(router_model: Path, tmp_path: Path) -> None:
    other_model = write_text_model(tmp_path / "other", context=96)
    tokenizer = other_model / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=1))  # the same, with another digest

    def two(worker: ScriptedWorker) -> None:
        worker.state.model.name, worker.state.model.fingerprint = "large", "model-2"

    def three(worker: ScriptedWorker) -> None:
        worker.state.model.fingerprint, worker.state.model.max_context = "model-3", 96

    def stranger(worker: ScriptedWorker) -> None:
        worker.state.model.name = "nobody's"

    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(ScriptedWorker.running(model, change=change))
            for model, change in (
                (router_model, lambda worker: None),
                (router_model, two),
                (other_model, three),
                (router_model, stranger),
            )
        ]
        small, large, other, unnamed = workers
        models = f"little={router_model},large={router_model},other={other_model}"
        router = await stack.enter_async_context(running_router(models, decode_targets=addresses(workers)))  # type: ignore[arg-type]
        await eventually(lambda: value("baton_workers", tier="decode") == 3)
        for name in ("", "little", "large", "other"):
            await send(router, 20, model=name)
        assert [len(worker.requests) for worker in workers] == [2, 1, 1, 0]
        assert [w.requests[0].model_fingerprint for w in (small, large, other)] == ["model-1", "model-2", "model-3"]
        listed = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert [(model.name, model.fingerprint, model.ready) for model in listed] == [
            ("little", "model-1", True), ("large", "model-2", True), ("other", "model-3", True)
        ]  # fmt: skip
        got = await router.stub.GetModel(inference_pb2.GetModelRequest(name="other"))
        assert (got.model.name, got.model.max_context) == ("other", 96)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(router, 20, model="unknown")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "'unknown' is not served here; 'little', 'large', 'other' are" in (caught.value.details() or "")
        state = await mesh_of(router)
        assert [(u.target, u.reason) for u in state.unused] == [(unnamed.address, "model")]
        assert {w.target: w.model for w in state.workers} == {
            small.address: "little", large.address: "large", other.address: "other"
        }  # fmt: skip
        await large.kill()
        await eventually(lambda: value("baton_model_workers", tier="decode", model="large") == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(router, 20, model="large")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await send(router, 20, model="other")


def test_a_digest_is_of_salt_key_and_all_before_it() -> None:
    digests = BlockDigests(b"k" * 16)
    chain = digests.chain(b"s", prompt_of(64), BLOCK)
    assert chain == digests.chain(b"s", prompt_of(70), BLOCK)
    assert chain[:2] == digests.chain(b"s", prompt_of(32), BLOCK)
    other = digests.chain(b"s", [51, *prompt_of(64)[1:]], BLOCK)
    assert not set(chain) & set(other)


async def test_addresses_that_a_name_lost_leave_nothing(router_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods of a release that is not used come and go, each at an address of its own."""
    addresses = ["10.0.0.0:1"]

    async def resolve(target: str) -> list[str]:
        return list(addresses)

    async def watch(view: WorkerView, tier: str, target: str) -> None:
        state = worker_pb2.WatchResponse(incarnation=target)
        view._refuse(Unused(target, tier, state, Refusal(Unfit.PROTOCOL, "it is of another release")))
        try:
            await asyncio.Event().wait()
        finally:
            view._drop(tier, target, None)

    monkeypatch.setattr(workers_module, "resolve_target", resolve)
    monkeypatch.setattr(WorkerView, "_follow_worker", watch)
    view = WorkerView(ChannelPool(), Models([TextModel.load(router_model)]), 1.0, 0.001)
    async with view.watching(["dns:///decode:1"], []):
        for number in range(5):
            addresses[:] = [f"10.0.0.{number}:1"]
            await eventually(lambda: set(view._complained) == {("decode", addresses[0])})
