"""TLS between real servers and channels: who is believed, and certificates that change while all of it runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.cli.throwaway_ca import CertificateFiles, ThrowawayCa
from baton.client import AsyncClient, BatonRpcError, Client, Tls
from baton.rpc.access import Who
from baton.rpc.caller import Caller
from baton.rpc.cannot_start import CannotStart
from baton.rpc.channel import SERVER_OPTIONS, ChannelPool, mesh_channel
from baton.rpc.dialer import Dialer
from baton.rpc.gate import Gate
from baton.rpc.mesh_token import MESH_HEADER
from baton.rpc.reloaded import Reloaded
from baton.rpc.tls import Pems, TlsFiles, server_credentials, watched
from tests.security.serving import call, serving

LIST = "/baton.v1.Inference/ListModels"
DECODE = "/baton.internal.v1.Decode/Generate"
OPEN = Gate(anonymous=Who.CLIENT | Who.PEER)


def pems(cert: CertificateFiles | None, ca: Path | None) -> Reloaded[Pems]:
    files = TlsFiles(cert=cert.cert if cert else None, key=cert.key if cert else None, ca=ca)
    return watched("--tls-cert", files)


@contextlib.asynccontextmanager
async def tls_server(cert: CertificateFiles, client_ca: Path | None = None, gate: Gate = OPEN) -> AsyncIterator[str]:
    async with serving(gate, server_credentials(pems(cert, client_ca))) as target:
        yield target


async def ask(target: str, dialer: Dialer, method: str = DECODE) -> str:
    async with mesh_channel(target, dialer) as channel:
        return await call(channel, method)


async def test_a_server_is_believed_if_its_certificate_is_of_our_ca_and_for_its_name(
    ca: ThrowawayCa, tmp_path: Path
) -> None:
    stranger = ThrowawayCa(tmp_path, "stranger")
    async with tls_server(ca.issue("decode", names=["decode", "mesh"])) as target:
        assert await ask(target, Dialer(pems(None, ca.ca), "mesh")) == "OK"
        assert await ask(target, Dialer(pems(None, ca.ca), "prefill")) == "UNAVAILABLE"
        assert await ask(target, Dialer(pems(None, ca.ca))) == "UNAVAILABLE", "it is not for 127.0.0.1"
        assert await ask(target, Dialer(pems(None, stranger.ca), "mesh")) == "UNAVAILABLE"
        assert await ask(target, Dialer()) == "UNAVAILABLE", "no plain text"
    async with tls_server(ca.issue("local", addresses=["127.0.0.1"])) as target:
        assert await ask(target, Dialer(pems(None, ca.ca))) == "OK"
    async with serving(OPEN) as target:
        assert await ask(target, Dialer(pems(None, ca.ca))) == "UNAVAILABLE", "and none back to it"


async def test_mutual_tls_asks_for_a_certificate_of_our_ca_with_the_right_name(ca: ThrowawayCa, tmp_path: Path) -> None:
    stranger = ThrowawayCa(tmp_path, "stranger")
    gate = Gate(anonymous=Who.PEER, names=frozenset({"router", "decode"}))
    router, other = ca.issue("router", names=["router"]), ca.issue("other", names=["other"])
    forged = stranger.issue("forged", names=["router"])
    async with tls_server(ca.issue("server", names=["mesh"]), ca.ca, gate) as target:
        for cert, expected in (
            (router, "OK"),
            (other, "PERMISSION_DENIED"),
            (forged, "UNAVAILABLE"),
            (None, "UNAVAILABLE"),
        ):
            assert await ask(target, Dialer(pems(cert, ca.ca), "mesh")) == expected, cert
        assert await ask(target, Dialer(pems(router, ca.ca), "mesh"), LIST) == "PERMISSION_DENIED"


async def test_a_clients_certificate_names_its_tenant(ca: ThrowawayCa) -> None:
    gate = Gate(anonymous=Who.CLIENT, tenant_of=lambda name: Caller(name) if name != "a/b" else None)
    async with tls_server(ca.issue("server", names=["mesh"]), ca.ca, gate) as target:
        for name, expected in (("acme", "OK acme"), ("a/b", "PERMISSION_DENIED")):
            cert = ca.issue(name, file="client")
            assert await ask(target, Dialer(pems(cert, ca.ca), "mesh"), LIST) == expected


@pytest.mark.usefixtures("eager")
async def test_a_servers_new_certificate_counts_at_the_next_handshake(
    ca: ThrowawayCa, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Dialer(pems(None, ca.ca), "old"), Dialer(pems(None, ca.ca), "new")
    cert = ca.issue("server", names=["old"])
    async with tls_server(cert) as target, mesh_channel(target, old) as before:
        assert await call(before, DECODE) == "OK"
        assert await ask(target, new) == "UNAVAILABLE"
        other = ca.issue("other", names=["new"])
        cert.cert.write_bytes(other.cert.read_bytes())
        assert await ask(target, old) == "OK", "half a pair is no pair"
        assert "no PEM pair" in caplog.text
        ca.issue("server", names=["new"])
        assert await ask(target, new) == "OK"
        assert await ask(target, old) == "UNAVAILABLE"
        assert await call(before, DECODE) == "OK", "what is connected stays so"
        cert.key.unlink()
        assert await ask(target, new) == "OK"


@pytest.mark.usefixtures("eager")
async def test_a_new_ca_of_callers_counts_as_well(ca: ThrowawayCa, tmp_path: Path) -> None:
    next_ca = ThrowawayCa(tmp_path, "next")
    both = tmp_path / "both.pem"
    both.write_bytes(ca.ca.read_bytes())
    mine, theirs = ca.issue("mine"), next_ca.issue("theirs")
    async with tls_server(ca.issue("server", names=["mesh"]), both) as target:
        assert await ask(target, Dialer(pems(theirs, ca.ca), "mesh")) == "UNAVAILABLE"
        both.write_bytes(ca.ca.read_bytes() + next_ca.ca.read_bytes())
        assert await ask(target, Dialer(pems(theirs, ca.ca), "mesh")) == "OK"
        both.write_bytes(next_ca.ca.read_bytes())
        assert await ask(target, Dialer(pems(mine, ca.ca), "mesh")) == "UNAVAILABLE"


@pytest.mark.usefixtures("eager")
async def test_callers_with_a_new_certificate_open_new_channels_and_calls_keep_theirs(ca: ThrowawayCa) -> None:
    gate = Gate(anonymous=Who.PEER, names=frozenset({"after"}))
    cert = ca.issue("client", names=["before"])
    async with tls_server(ca.issue("server", names=["mesh"]), ca.ca, gate) as target:
        pool = ChannelPool(dialer=Dialer(pems(cert, ca.ca), "mesh"))
        async with pool.channel(target) as one:
            async with pool.channel(target) as two:
                assert two is one
            assert await call(one, DECODE) == "PERMISSION_DENIED"
            ca.issue("client", names=["after"])
            async with pool.channel(target) as renewed:
                assert renewed is not one
                assert await call(renewed, DECODE) == "OK"
            assert await call(one, DECODE) == "PERMISSION_DENIED", "open while it is in use"
        with pytest.raises(grpc.aio.UsageError):
            await call(one, DECODE)
        await pool.close()


async def test_channels_carry_the_mesh_token_as_it_is_now() -> None:
    tokens = ["1" * 32, "2" * 32]
    gate = Gate(anonymous=Who.NOBODY, peers=lambda: ("2" * 32, "3" * 32))
    async with serving(gate) as target:
        pool = ChannelPool(dialer=Dialer(tokens=lambda: tuple(tokens)))
        async with pool.channel(target) as channel:
            assert await call(channel, DECODE) == "UNAUTHENTICATED"
            tokens.pop(0)
            assert await call(channel, DECODE) == "OK"
            for method in ("/baton.internal.v1.ResponseCache/Lookup", "/baton.internal.v1.ResponseCache/Join"):
                assert await call(channel, method, (("x-other", "stays"),)) == "OK"
        await pool.close()
        async with grpc.aio.insecure_channel(target) as bare:
            assert await call(bare, DECODE, ((MESH_HEADER, "3" * 32),)) == "OK"


async def test_clients_speak_tls_and_show_their_key(ca: ThrowawayCa, tmp_path: Path) -> None:
    key = "a key"
    gate = Gate(anonymous=Who.NOBODY, clients=[lambda sent: Caller(subject="ann") if sent == key else None])
    mine = ca.issue("mine")
    tls = Tls(ca=ca.ca, cert=mine.cert, key=mine.key, server_name="router")
    async with tls_server(ca.issue("router", names=["router"]), ca.ca, gate) as target:
        async with AsyncClient(target, tls=tls, api_key=key, timeout=10) as client:
            assert await client.models() == []
        for wrong, code in ((tls, "UNAUTHENTICATED"), (Tls(ca=ca.ca, server_name="router"), "UNAVAILABLE")):
            async with AsyncClient(target, tls=wrong, timeout=10) as client:
                with pytest.raises(BatonRpcError) as caught:
                    await client.models()
                assert caught.value.code.name == code

        def ask_blocking() -> int:
            with Client(target, tls=tls, api_key=key, timeout=10) as client:
                return len(client.models())

        assert await asyncio.to_thread(ask_blocking) == 0
    with pytest.raises(OSError, match="gone"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "gone.pem"))


def test_what_is_no_certificate_is_said_at_the_start(ca: ThrowawayCa, tmp_path: Path) -> None:
    one, two = ca.issue("one"), ca.issue("two")
    nonsense = tmp_path / "nonsense"
    nonsense.write_bytes(b"\x00secret")
    for files in (
        TlsFiles(cert=one.cert, key=two.key),
        TlsFiles(cert=nonsense, key=one.key),
        TlsFiles(cert=one.cert, key=one.key, ca=nonsense),
        TlsFiles(cert=tmp_path / "none", key=one.key),
        TlsFiles(ca=one.key),
    ):
        with pytest.raises(CannotStart, match="--tls-cert: ") as caught:
            watched("--tls-cert", files)
        assert "secret" not in str(caught.value)


async def test_who_connects_and_says_nothing_is_cut_off(ca: ThrowawayCa) -> None:
    option = "grpc.server_handshake_timeout_ms"
    assert 0 < int(dict(SERVER_OPTIONS)[option]) <= 10_000
    sooner = [(name, 300 if name == option else value) for name, value in SERVER_OPTIONS]
    credentials = server_credentials(pems(ca.issue("server"), None))
    async with serving(OPEN, credentials, options=sooner) as target:
        host, _, port = target.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
