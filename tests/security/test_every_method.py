"""Every method of every service: with no credentials, wrong ones, and right ones of each kind."""

from __future__ import annotations

import asyncio
import hashlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc import interceptor
from baton.rpc.access import DECLARED, Who
from baton.rpc.caller import Caller
from baton.rpc.gate import OPEN, Gate
from baton.rpc.health import Health
from baton.rpc.mesh_token import MESH_HEADER
from tests.security.serving import call, every_method, serving

PEER, OPERATOR, KEY = "p" * 32, "o" * 32, "bk_" + "k" * 40
STRICT = Gate(
    anonymous=Who.NOBODY,
    clients=[lambda key: Caller("acme") if key == KEY else None],
    peers=lambda: (PEER,),
    operators=lambda: (OPERATOR,),
)
SHOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "client": (("authorization", f"Bearer {KEY}"),),
    "peer": ((MESH_HEADER, PEER),),
    "operator": (("authorization", f"Bearer {OPERATOR}"),),
    "nothing": (),
    "another key": (("authorization", f"Bearer {KEY}x"),),
    "a key as mesh token": ((MESH_HEADER, KEY),),
    "a mesh token as key": (("authorization", f"Bearer {PEER}"),),
    "no bearer": (("authorization", KEY),),
    "an empty key": (("authorization", "Bearer "),),
    "the digest of the key": (("authorization", f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}"),),
    "the key, twice": (("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")),
    "a good token and a wrong key": ((MESH_HEADER, PEER), ("authorization", "Bearer x")),
}
KINDS = {"client": Who.CLIENT, "peer": Who.PEER, "operator": Who.OPERATOR}


def test_every_method_is_declared_and_every_declaration_is_a_method() -> None:
    methods = every_method()
    assert set(DECLARED) == set(methods)
    exceptions = {name.split("/")[1] for name, who in DECLARED.items() if who is Who.ANYONE}
    assert exceptions == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert {name for name, who in DECLARED.items() if Who.CLIENT in who} == {
        name for name in methods if name.startswith("/baton.v1.")
    }


async def test_every_method_with_every_kind_of_credentials() -> None:
    async with serving(STRICT) as target, grpc.aio.insecure_channel(target) as channel:
        for name, who in DECLARED.items():
            for shown, metadata in SHOWN.items():
                if who is Who.ANYONE:
                    expected = "OK"
                elif shown not in KINDS:
                    expected = "UNAUTHENTICATED"
                elif KINDS[shown] & who:
                    expected = "OK acme" if shown == "client" else "OK"
                else:
                    expected = "PERMISSION_DENIED"
                assert await call(channel, name, metadata) == expected, (name, shown)


async def test_what_is_not_declared_is_for_nobody() -> None:
    undeclared = ("/baton.v1.Inference/Brew", "/baton.internal.v1.Worker/Erase", "/other.Service/Method")
    for gate in (STRICT, OPEN):
        async with serving(gate, more=undeclared) as target, grpc.aio.insecure_channel(target) as channel:
            for name in undeclared:
                for metadata in SHOWN.values():
                    assert await call(channel, name, metadata) == "PERMISSION_DENIED", name
            assert await call(channel, "/other.Service/Missing") == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("anonymous", "method", "expected"),
    [
        (Who.CLIENT, "/baton.v1.Inference/Chat", "OK"),
        (Who.CLIENT, "/baton.internal.v1.Decode/Generate", "PERMISSION_DENIED"),
        (Who.PEER, "/baton.internal.v1.Decode/Generate", "OK"),
        (Who.PEER, "/baton.internal.v1.Worker/Watch", "OK"),
        (Who.PEER, "/baton.internal.v1.Worker/DebugState", "PERMISSION_DENIED"),
        (Who.OPERATOR, "/baton.internal.v1.Worker/DebugState", "OK"),
        (Who.OPERATOR, "/baton.v1.Inference/Chat", "PERMISSION_DENIED"),
    ],
)
async def test_where_nobody_is_asked_a_port_still_is_for_its_own_kind(
    anonymous: Who, method: str, expected: str
) -> None:
    async with serving(Gate(anonymous=anonymous)) as target, grpc.aio.insecure_channel(target) as channel:
        assert await call(channel, method) == expected
        # Credentials that nobody asks for do not harm: callers may have theirs first.
        assert await call(channel, method, ((MESH_HEADER, PEER), ("authorization", f"Bearer {KEY}"))) == expected


async def test_refusals_say_why_and_nothing_of_what_was_sent() -> None:
    async with serving(STRICT) as target, grpc.aio.insecure_channel(target) as channel:
        flush = channel.unary_unary("/baton.internal.v1.CacheAdmin/Flush")
        for shown in SHOWN.keys() - {"operator"}:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await flush(b"", metadata=(*SHOWN[shown], ("x-request-id", "mine")), timeout=10)
            trailers = dict(caught.value.trailing_metadata() or ())
            assert b"mine" in trailers["grpc-status-details-bin"]
            told = f"{caught.value.details()} {trailers}"
            for secret in (KEY, PEER, OPERATOR, hashlib.sha256(KEY.encode()).hexdigest()):
                assert secret not in told


async def test_streams_of_unknown_callers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "MAX_UNKNOWN_STREAMS", 3)
    server = grpc.aio.server(interceptors=[interceptor.RimInterceptor(gate=STRICT)])
    health = Health(asyncio.Event())
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch  # type: ignore[no-untyped-call]
        open_ones = [watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for one in open_ones:
            await one.read()
        assert await watch(health_pb2.HealthCheckRequest()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call(channel, "/grpc.health.v1.Health/Check") != "RESOURCE_EXHAUSTED", "probes still pass"
        open_ones[0].cancel()
        async with asyncio.timeout(10):
            while not await _opens(watch(health_pb2.HealthCheckRequest())):  # noqa: ASYNC110 the server notices
                await asyncio.sleep(0.01)
    await server.stop(0)


async def _opens(watching: grpc.aio.UnaryStreamCall) -> bool:
    try:
        await watching.read()
    except grpc.aio.AioRpcError:
        return False
    return True
