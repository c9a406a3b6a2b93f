"""Decode services that share more or less with a prefill service: each takes the best way there is, or says why not."""

from __future__ import annotations

import asyncio
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.handoff.transport import name
from baton.internal.v1 import decode_pb2, decode_pb2_grpc
from tests.end_to_end.test_pure_tokens import fingerprint
from tests.fixtures.mesh import Mesh, Service, running_mesh
from tests.fixtures.models import full_sampling, random_llama

pytestmark = pytest.mark.timeout(300)  # several services, each of which measures the machine when it starts

PROMPT = [5 + (j * j) % 370 for j in range(300)]
TOKENS = 12


async def ask(service: Service, *prefill: Service) -> tuple[list[int], decode_pb2.Finished]:
    """One request of a decode service: its tokens, and how it went."""
    tokens: list[int] = []
    async with grpc.aio.insecure_channel(service.address) as channel:
        request = decode_pb2.GenerateRequest(
            request_id=uuid.uuid4().hex,
            model_fingerprint=await fingerprint(service),
            token_ids=PROMPT,
            sampling=full_sampling(max_tokens=TOKENS),
            prefill_candidates=[decode_pb2.PrefillCandidate(target=one.address) for one in prefill],
        )
        async for message in decode_pb2_grpc.DecodeStub(channel).Generate(request, timeout=60):
            tokens += message.tokens.token_ids
            if message.WhichOneof("event") == "finished":
                return tokens, message.finished
    raise AssertionError("no end")


async def metric(service: Service, text: str) -> float:
    """One series, as it is written in the exposition."""
    url = f"http://{service.metrics}/metrics"
    exposition = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    return next(float(line.rpartition(" ")[2]) for line in exposition.splitlines() if line.startswith(text))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture
async def mesh(model: Path, tmp_path: Path) -> AsyncIterator[Mesh]:
    flags = ("--shm-dir", str(tmp_path / "shm"), "--step-tokens", "64", "--no-prefix-cache")
    async with running_mesh(model, worker_flags=flags) as mesh:
        yield mesh


async def more(mesh: Mesh, model: Path, kind: str, *flags: str) -> Service:
    if kind.startswith("decode"):
        flags = ("--prefill-placement", "remote", *flags)
    return await mesh.start(kind, "--model", str(model), "--step-tokens", "64", "--no-prefix-cache", *flags)


async def test_the_best_way_both_share(mesh: Mesh, model: Path, tmp_path: Path) -> None:
    prefill, auto = mesh.tier("prefill")[0], mesh.tier("decode")[0]
    expected, local = await ask(auto)
    assert name(local.transport) == ""
    tokens, finished = await ask(auto, prefill)
    assert (tokens, name(finished.transport)) == (expected, "shm")
    moved = await metric(auto, 'baton_handoff_bytes_total{transport="shm"}')
    assert moved == len(PROMPT) * 3 * 2 * 2 * 16 * 4, "each token, layer, K and V, head, and float32, once"

    # Another directory is another host: what cannot be reached is given up in the same request.
    (tmp_path / "other").mkdir(mode=0o700)
    apart = ("--shm-dir", str(tmp_path / "other"))
    far = await more(mesh, model, "decode-far", *apart)
    tokens, finished = await ask(far, prefill)
    assert (tokens, name(finished.transport)) == (expected, "grpc")
    assert await metric(far, 'baton_handoff_fallbacks_total{transport="shm"}') == 1
    assert await metric(far, 'baton_handoff_bytes_total{transport="grpc"}') == moved

    # int8 is for the call only, and the tokens come.
    coded = await more(mesh, model, "decode-coded", "--transport", "grpc", "--kv-codec", "int8")
    tokens, finished = await ask(coded, prefill)
    assert (len(tokens), name(finished.transport)) == (TOKENS, "grpc")
    assert await metric(coded, 'baton_handoff_bytes_total{transport="grpc"}') == moved * (16 + 2) / (16 * 4)

    # One way only, and it does not lead there: the request fails and says so. It is not computed here in silence.
    forced = await more(mesh, model, "decode-forced", "--transport", "shm", *apart)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(forced, prefill)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "shm" in (refused.value.details() or "")
    assert str(tmp_path) not in (refused.value.details() or "")
    await mesh.wait_quiet()


async def test_what_prefill_offers_is_what_there_is(mesh: Mesh, model: Path, tmp_path: Path) -> None:
    auto = mesh.tier("decode")[0]
    shared = ("--shm-dir", str(tmp_path / "shm"))
    only_grpc = await more(mesh, model, "prefill-grpc", "--transport", "grpc", *shared)
    tokens, finished = await ask(auto, only_grpc)
    assert name(finished.transport) == "grpc"
    assert await metric(auto, 'baton_handoff_fallbacks_total{transport="shm"}') == 0
    only_shm = await more(mesh, model, "prefill-shm", "--transport", "shm", *shared)
    again, finished = await ask(auto, only_shm)
    assert (again, name(finished.transport)) == (tokens, "shm")
    decode_grpc = await more(mesh, model, "decode-grpc", "--transport", "grpc", *shared)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(decode_grpc, only_shm)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_killed_prefill_service_gives_its_memory_back(mesh: Mesh, model: Path, tmp_path: Path) -> None:
    prefill, decode = mesh.tier("prefill")[0], mesh.tier("decode")[0]
    expected, _ = await ask(decode)
    _, finished = await ask(decode, prefill)
    assert name(finished.transport) == "shm"
    assert _pools(decode) == 2
    prefill.kill()
    await prefill.process.wait()
    deadline = time.monotonic() + 10
    while _pools(decode) != 1:
        assert time.monotonic() < deadline, "the dead service's memory is held"
        await asyncio.sleep(0.02)
    tokens, finished = await ask(decode, prefill)
    assert (tokens, name(finished.transport)) == (expected, "")
    left = list((tmp_path / "shm").iterdir())
    assert len(left) == 1
    again = await more(mesh, model, "prefill-0", "--shm-dir", str(tmp_path / "shm"))
    assert left[0] not in (tmp_path / "shm").iterdir()
    tokens, finished = await ask(decode, again)
    assert (tokens, name(finished.transport)) == (expected, "shm")


def _pools(service: Service) -> int:
    """KV pools that a service has mapped, its own among them."""
    maps = Path(f"/proc/{service.pid}/maps").read_text()
    return len({line.split()[4] for line in maps.splitlines() if "memfd:baton-kv" in line})
