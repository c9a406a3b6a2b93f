"""A mesh with everything switched on: TLS on every connection, keys, tokens. It serves who may, and nobody else, and no
secret of it is to be seen anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest

from baton.client import Tls
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc.api_keys import digest_of, new_key
from baton.rpc.mesh_token import MESH_HEADER
from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.fixtures.otlp import receiver
from tests.fixtures.up import BATON, Up, running_up

KEYS = {"acme": new_key(), "globex": new_key()}
WRONG = new_key()
MESH, OPERATOR, SALT = secrets.token_hex(32), secrets.token_hex(32), secrets.token_hex(32)


async def baton(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and whole output of a command."""
    process = await asyncio.create_subprocess_exec(
        *BATON, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode()


async def code_of(call: grpc.aio.UnaryUnaryCall | grpc.aio.UnaryStreamCall) -> str:
    with contextlib.suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            await call.read()
            call.cancel()
            return "OK"
    return (await call.code()).name


async def scraped(address: str) -> str:
    """What a service's metrics endpoint says."""

    def get() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(get)


async def knock(up: Up, trusting: grpc.ChannelCredentials) -> None:
    """What comes to a worker's and the router's ports without being asked."""
    addresses = {service["name"]: service for service in up.ready["services"]}
    watch = worker_pb2.WatchRequest()
    token = ((MESH_HEADER, MESH),)
    async with grpc.aio.insecure_channel(addresses["decode-0"]["grpc"]) as plain:
        assert await code_of(worker_pb2_grpc.WorkerStub(plain).Watch(watch, metadata=token, timeout=5)) == "UNAVAILABLE"
    async with grpc.aio.secure_channel(addresses["decode-0"]["grpc"], trusting) as uncertified:
        call = worker_pb2_grpc.WorkerStub(uncertified).Watch(watch, metadata=token, timeout=5)
        assert await code_of(call) == "UNAVAILABLE"
    async with grpc.aio.secure_channel(addresses["router"]["grpc"], trusting) as channel:
        models = inference_pb2_grpc.InferenceStub(channel).ListModels
        for metadata, expected in (
            ((), "UNAUTHENTICATED"),
            ((("authorization", f"Bearer {WRONG}"),), "UNAUTHENTICATED"),
            ((("authorization", f"Bearer {OPERATOR}"),), "UNAUTHENTICATED"),
            (token, "PERMISSION_DENIED"),
            ((("authorization", f"Bearer {KEYS['acme']}"),), "OK"),
        ):
            assert await code_of(models(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=5)) == expected
    async with grpc.aio.insecure_channel(addresses["decode-0"]["admin"]) as channel:
        debug = worker_pb2_grpc.WorkerStub(channel).DebugState
        for metadata, expected in (
            ((), "UNAUTHENTICATED"),
            (token, "PERMISSION_DENIED"),
            ((("authorization", f"Bearer {OPERATOR}"),), "OK"),
        ):
            assert await code_of(debug(worker_pb2.DebugStateRequest(), metadata=metadata, timeout=5)) == expected


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_mesh_with_everything_switched_on(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, logs = tmp_path / "keys", tmp_path / "logs"
    keys.write_text("".join(f"{tenant} = {digest_of(key)}\n" for tenant, key in KEYS.items()))
    monkeypatch.setenv("BATON_MESH_TOKEN", MESH)
    monkeypatch.setenv("BATON_ADMIN_TOKEN", OPERATOR)
    monkeypatch.setenv("BATON_SALT_SECRET", SALT)
    monkeypatch.setenv("BATON_LOG_LEVEL", "DEBUG")
    flags = (
        "--tls", "--set", f"router.api-keys={keys}", "--log-dir", str(logs),
        "--prefill-placement", "remote", "--set", "decode.transport=grpc",
    )  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        collector = await stack.enter_async_context(receiver())
        monkeypatch.setenv("BATON_OTLP_ENDPOINT", collector.address)
        up = await stack.enter_async_context(running_up(tmp_path, small_model, *flags))
        ca, router = up.ready["ca"], up.ready["router"]
        admins = {service["name"]: service["admin"] for service in up.ready["services"]}

        async def ask(tenant: str) -> dict[str, object]:
            code, out = await baton(
                "--ca", ca, "generate", "x" * 100, "--target", router, "--max-tokens", "8", "--temperature", "0",
                "--json", BATON_API_KEY=KEYS[tenant],
            )  # fmt: skip
            assert code == 0, out
            answer: dict[str, object] = json.loads(out)
            return answer

        first, again, other = await ask("acme"), await ask("acme"), await ask("globex")
        assert (first["prefill_placement"], first["cache"], again["cache"]) == ("remote", "miss", "hit")
        assert other["cache"] == "miss", "what one tenant asked is nothing that another finds"
        assert first["text"] == other["text"]
        code, out = await baton("--ca", ca, "generate", "x", "--target", router)
        assert code == 1
        assert "UNAUTHENTICATED" in out
        assert "BATON_API_KEY" in out
        await knock(up, Tls(ca=Path(ca)).credentials())

        assert (await baton("trace", "--admin", admins["router"]))[0] == 1, "no token"
        for command in (
            ("top", "--once", "--json", "--admin", admins["router"]),
            ("cache", "stats", "--json", "--cache", admins["cache"]),
        ):
            code, out = await baton(*command, BATON_ADMIN_TOKEN=OPERATOR)
            assert code == 0, out

        flags_of_all = "\n".join(
            " ".join(psutil.Process(process.pid).cmdline()) for process in up.family if process.is_running()
        )
        metrics = "".join([await scraped(service["metrics"]) for service in up.ready["services"]])
        async with asyncio.timeout(20):
            while "baton.v1.Inference/ListModels" not in (spans := "".join(map(str, collector.requests))):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        said = up.output.read_text() + "".join(path.read_text() for path in logs.iterdir())
    assert "serving" in said
    assert 'baton_refused_calls_total{method="/baton.v1.Inference/ListModels",reason="UNAUTHENTICATED"} 3.0' in metrics
    seen = {"flags": flags_of_all, "logs": said, "ready file": json.dumps(up.ready), "metrics": metrics, "spans": spans}
    for name, secret in {**KEYS, "wrong": WRONG, "mesh": MESH, "operator": OPERATOR, "salt": SALT}.items():
        for place, text in seen.items():
            assert secret not in text, (name, place)
