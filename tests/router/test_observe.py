"""What the router remembers of requests, whatever their end, and what it tells of the mesh."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from typer.testing import CliRunner, Result

from baton.cli.main import app
from baton.internal.v1 import observe_pb2, observe_pb2_grpc
from baton.v1 import inference_pb2, sampling_pb2
from baton_router.pulse import Percentiles, Pulse
from baton_router.record import Record
from baton_router.records import Records
from tests.router.conftest import Router
from tests.router.scripted import ScriptedWorker


def ask(max_tokens: int = 4, text: str = "hello") -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        text=text, sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, temperature=1)
    )


async def record_of(router: Router, request_id: str) -> observe_pb2.RequestRecord:
    async with grpc.aio.insecure_channel(router.address) as channel:
        stub = observe_pb2_grpc.ObserveStub(channel)
        for _ in range(100):  # a cancelled request ends a moment after its client
            latest = (await stub.ListRecords(observe_pb2.ListRecordsRequest(), timeout=5)).records
            if any(record.request_id == request_id for record in latest):
                answer = await stub.GetRecord(observe_pb2.GetRecordRequest(request_id=request_id), timeout=5)
                return answer.record
            await asyncio.sleep(0.02)
    raise AssertionError(f"no record of {request_id}")


def sums_up(record: observe_pb2.RequestRecord) -> bool:
    total = record.summary.ledger.total
    entries = [entry.duration.ToNanoseconds() for entry in total.entries]
    parts = {(entry.hop, entry.kind) for entry in total.entries}
    whole = total.total.ToNanoseconds()
    return sum(entries) + total.residual.ToNanoseconds() == whole and len(parts) == len(entries)


async def test_a_request_that_ends_well(router: Router, worker: ScriptedWorker) -> None:
    async for _ in router.stub.StreamGenerate(ask(), metadata=(("x-request-id", "good"),)):
        pass
    record = await record_of(router, "good")
    assert (record.method, record.outcome) == ("StreamGenerate", "ok")
    assert record.summary.usage.completion_tokens == 4
    assert sums_up(record)


async def test_a_refused_one_has_a_ledger_too(router: Router, worker: ScriptedWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in router.stub.StreamGenerate(ask(text=""), metadata=(("x-request-id", "bad"),)):
            pass
    trailers = dict(caught.value.trailing_metadata() or ())
    assert "total;dur=" in str(trailers["server-timing"])
    assert "grpc-status-details-bin" in trailers
    record = await record_of(router, "bad")
    assert record.outcome == "invalid_argument"
    assert sums_up(record)


async def test_a_cancelled_one(router: Router, worker: ScriptedWorker) -> None:
    call = router.stub.StreamGenerate(ask(100), metadata=(("x-request-id", "gone"),))
    seen = 0
    async for message in call:
        seen += message.WhichOneof("event") == "chunk"
        if seen == 3:
            break
    call.cancel()
    record = await record_of(router, "gone")
    assert record.outcome == "cancelled"
    assert record.summary.usage.completion_tokens >= 3
    assert record.summary.ledger.HasField("first_token")
    assert sums_up(record)


async def test_nothing_of_the_prompt_is_kept(router: Router, worker: ScriptedWorker) -> None:
    async for _ in router.stub.StreamGenerate(ask(text="a secret"), metadata=(("x-request-id", "quiet"),)):
        pass
    assert b"secret" not in (await record_of(router, "quiet")).SerializeToString()


async def test_mesh_state(router: Router, worker: ScriptedWorker) -> None:
    async for _ in router.stub.StreamGenerate(ask()):
        pass
    async with grpc.aio.insecure_channel(router.address) as channel:
        call = observe_pb2_grpc.ObserveStub(channel).WatchMesh(observe_pb2.WatchMeshRequest(interval_ms=100))
        states = []
        async for state in call:
            states.append(state)
            if len(states) == 2:
                break
        call.cancel()
    last = states[-1]
    assert dict(last.outcomes) == {"ok": 1}
    seconds = last.window.ToNanoseconds() / 1e9
    assert 10 <= seconds <= 10.1
    assert last.tokens_per_second == pytest.approx(4 / seconds)
    assert last.time_to_first_token.p50.ToNanoseconds() > 0
    assert last.ledger
    assert [seen.target for seen in last.workers] == [worker.address]


async def test_an_unknown_request(router: Router) -> None:
    async with grpc.aio.insecure_channel(router.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await observe_pb2_grpc.ObserveStub(channel).GetRecord(observe_pb2.GetRecordRequest(request_id="never"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def trace(router: Router, wanted: str) -> Result:
    """`baton trace` of one of three requests."""
    for name in ("req-1", "req-10", "other-request"):
        request = inference_pb2.GenerateRequest(text="fox", sampling=sampling_pb2.SamplingParams(max_tokens=2))
        await router.stub.Generate(request, metadata=(("x-request-id", name),))
    return await asyncio.to_thread(
        CliRunner().invoke, app, ["trace", wanted, "--admin", router.address, "--json"], env={"COLUMNS": "200"}
    )


@pytest.mark.parametrize(("wanted", "shown"), [("req-1", "req-1"), ("req-10", "req-10"), ("other", "other-request")])
async def test_trace_takes_a_whole_id_or_its_beginning(
    router: Router, worker: ScriptedWorker, wanted: str, shown: str
) -> None:
    result = await trace(router, wanted)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["request_id"] == shown


@pytest.mark.parametrize(("wanted", "complaint"), [("req", "2 recent requests begin with"), ("none", "not among")])
async def test_trace_says_why_it_shows_nothing(
    router: Router, worker: ScriptedWorker, wanted: str, complaint: str
) -> None:
    result = await trace(router, wanted)
    assert result.exit_code != 0
    assert complaint in result.output


def test_the_oldest_records_go() -> None:
    records = Records(3)
    for name in "abcab":
        records.add(Record(name, "Generate", Pulse()))
    records.add(Record("d", "Generate", Pulse()))
    assert [record.request_id for record in records.latest()] == ["d", "b", "a"]
    assert records.get("c") is None


def test_the_window_forgets() -> None:
    now = 0
    pulse = Pulse(seconds=10, now=lambda: now)
    pulse.chunk(5, None)
    pulse.chunk(5, 1_000_000)
    assert pulse.window().tokens_per_second == 1.0
    assert pulse.window().inter_token == Percentiles(1_000_000, 1_000_000, 1_000_000)
    now = 10_050_000_000
    assert pulse.window().tokens_per_second == pytest.approx(10 / 10.05)
    now = 11_000_000_000
    assert pulse.window().tokens_per_second == 0.0
    assert pulse.window().inter_token is None


def test_nothing_is_too_much_to_count() -> None:
    """4,000 messages a second, of which one in a hundred is late, and as many requests."""
    now = 0
    pulse = Pulse(seconds=10, now=lambda: now)
    summary = inference_pb2.Summary()
    summary.ledger.first_token.total.FromNanoseconds(5_000_000)
    for turn in range(12 * 4_000):
        now = turn * 250_000
        pulse.chunk(1, 50_000_000 if turn % 100 == 0 else 2_000_000)
        pulse.ended("ok", summary)
    now = 12_000_000_000
    window = pulse.window()
    assert window.tokens_per_second == pytest.approx(4_000)
    assert window.outcomes["ok"] / window.seconds == pytest.approx(4_000)
    assert window.inter_token is not None
    assert (window.inter_token.p50, window.inter_token.p90) == (2_000_000, 2_000_000)
    assert window.time_to_first_token == Percentiles(5_000_000, 5_000_000, 5_000_000)


def test_a_busy_moment_weighs_as_much_as_it_held() -> None:
    now = 0
    pulse = Pulse(seconds=10, now=lambda: now)
    for _ in range(9_000):
        pulse.chunk(1, 30)
    now = 1_000_000_000
    for _ in range(500):
        pulse.chunk(1, 10)
    assert pulse.window().inter_token == Percentiles(30, 30, 30)
    assert sum(len(part.gaps.weighted()) for part in pulse._slices) == 400


@pytest.mark.parametrize("status", [inference_pb2.CACHE_STATUS_HIT, inference_pb2.CACHE_STATUS_SEMANTIC])
def test_a_hit_says_nothing_of_how_fast_tokens_are_generated(status: inference_pb2.CacheStatus.ValueType) -> None:
    pulse = Pulse()
    record = Record("hit", "Generate", pulse)
    with record.closing():
        record.summary.cache_status = status
        for _ in range(6):
            record.account.first_token()
            record.chunk(1)
            record.account.handed_over()
    assert record.summary.ledger.HasField("first_token")
    window = pulse.window()
    assert (window.outcomes["ok"], window.cache_hits, window.tokens_per_second) == (1, 1, 0.0)
    assert window.time_to_first_token is window.inter_token is None


def test_a_shared_generation_is_counted_and_its_first_token_is_one() -> None:
    pulse = Pulse()
    record = Record("follower", "Generate", pulse)
    with record.closing():
        record.coalesced("leader")
        record.account.first_token()
        record.chunk(1)
        record.account.handed_over()
    window = pulse.window()
    assert (window.cache_hits, window.coalesced, window.tokens_per_second) == (0, 1, 0.0)
    assert window.time_to_first_token is not None


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([(value, 1.0) for value in range(100, 0, -1)]) == Percentiles(51, 91, 100)
    assert Percentiles.of([(1, 98.0), (2, 1.0), (3, 1.0)]) == Percentiles(1, 1, 3)
