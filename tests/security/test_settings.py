"""What services refuse to start with, and what they make of what they are given."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import jwt
import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.cli.throwaway_ca import ThrowawayCa
from baton.rpc.access import Who
from baton.rpc.api_keys import digest_of, parse_keys
from baton.rpc.cannot_start import CannotStart
from baton.rpc.errors import PermissionDenied, Unauthenticated
from baton.rpc.mesh_token import MESH_HEADER
from baton.rpc.security import Security, assemble, is_loopback
from baton_cache.settings import CacheSettings
from baton_decode.settings import DecodeSettings
from baton_router.settings import RouterSettings

CHAT, DECODE, TOP = (
    "/baton.v1.Inference/Chat",
    "/baton.internal.v1.Decode/Generate",
    "/baton.internal.v1.Observe/WatchMesh",
)
EVERYWHERE, TOKEN = "0.0.0.0:50051", "t" * 32


def built(kind: type[RouterSettings | DecodeSettings], **given: object) -> Security:
    settings = kind(**given)  # type: ignore[arg-type]
    return assemble(settings, settings.listen, settings.metrics_listen)


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("a-host:1", False),
        (":1", False),
    ],
)
def test_what_is_loopback(listen: str, loopback: bool) -> None:
    assert is_loopback(listen) is loopback


@pytest.mark.parametrize("kind", [RouterSettings, DecodeSettings])
def test_nothing_listens_beyond_loopback_where_nobody_is_asked(
    kind: type[RouterSettings | DecodeSettings], ca: ThrowawayCa
) -> None:
    flag = "--api-keys" if kind is RouterSettings else "--mesh-token-file"
    with pytest.raises(CannotStart, match=f"whoever reaches this port could use it.*{flag}.*--allow-unauthenticated"):
        built(kind, listen=EVERYWHERE)
    cert = ca.issue("server")
    tls = {"tls_cert": cert.cert, "tls_key": cert.key}
    with pytest.raises(CannotStart, match="whoever reaches"):
        built(kind, listen=EVERYWHERE, **tls)
    built(kind, listen=EVERYWHERE, allow_unauthenticated=True)
    assert built(kind, listen=EVERYWHERE, **tls, tls_client_ca=ca.ca).credentials is not None
    with pytest.raises(CannotStart, match="whoever reaches this port could read metrics"):
        built(kind, metrics_listen="0.0.0.0:9464")
    built(kind, metrics_listen="0.0.0.0:9464", allow_unauthenticated_metrics=True)


def test_operators_come_by_loopback_only() -> None:
    with pytest.raises(CannotStart, match="by loopback only"):
        built(RouterSettings, admin_listen="0.0.0.0:50052", admin_token=TOKEN, allow_unauthenticated=True)


def test_a_mesh_token_is_for_workers_not_for_a_routers_clients(tmp_path: Path) -> None:
    built(DecodeSettings, listen=EVERYWHERE, mesh_token=TOKEN)
    with pytest.raises(CannotStart, match="whoever reaches"):
        built(RouterSettings, listen=EVERYWHERE, mesh_token=TOKEN)
    keys = tmp_path / "keys"
    keys.write_text(f"acme = {digest_of('key')}\n")
    security = built(RouterSettings, listen=EVERYWHERE, mesh_token=TOKEN, api_keys=keys, admin_token="o" * 32)
    gate, admin = security.gate, security.admin_gate
    shown = (("authorization", "Bearer key"),)
    assert gate.examine(CHAT, shown).caller.tenant == "acme"
    with pytest.raises(PermissionDenied):
        gate.examine(DECODE, shown)
    with pytest.raises(PermissionDenied):
        gate.examine(CHAT, ((MESH_HEADER, TOKEN),))
    with pytest.raises(Unauthenticated):
        gate.examine(TOP, (("authorization", f"Bearer {'o' * 32}"),))
    assert admin.examine(TOP, (("authorization", f"Bearer {'o' * 32}"),)).who is Who.OPERATOR
    for wrong in ((), shown):
        with pytest.raises(Unauthenticated):
            admin.examine(TOP, wrong)


def test_keys_and_tokens_side_by_side(tmp_path: Path) -> None:
    keys, secret = tmp_path / "keys", tmp_path / "secret"
    keys.write_text(f"acme = {digest_of('a.key.of-three-parts')}\n")
    secret.write_text("s" * 32)
    given = {"jwt_key_file": secret, "jwt_algorithm": "HS256", "jwt_issuer": "us", "jwt_audience": "baton"}
    gate = built(RouterSettings, listen=EVERYWHERE, api_keys=keys, **given).gate
    token = jwt.encode({"iss": "us", "aud": "baton", "exp": 2**33, "tenant": "globex", "sub": "ann"}, "s" * 32)
    for credential, caller in (("a.key.of-three-parts", "acme"), (token, "globex")):
        for scheme in ("Bearer", "bearer"):
            assert gate.examine(CHAT, (("authorization", f"{scheme} {credential}"),)).caller.tenant == caller
    with pytest.raises(Unauthenticated):
        gate.examine(CHAT, (("authorization", f"Bearer {token[:-2]}"),))
    secret.write_text("too short")
    with pytest.raises(CannotStart, match="--jwt-key-file: HS256 needs a secret of at least 32 bytes"):
        built(RouterSettings, **given)


async def test_baton_up_takes_no_password_as_a_flag() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.cli", "up", "--redis-url", "redis://:hunter2@127.0.0.1",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert "BATON_REDIS_URL" in output.decode()
    assert "hunter2" not in output.decode()


def test_a_new_key_and_its_line_go_together() -> None:
    made = CliRunner().invoke(app, ["new-key", "acme"])
    assert made.exit_code == 0
    assert parse_keys(made.stderr) == {digest_of(made.stdout.strip()): "acme"}
    assert CliRunner().invoke(app, ["new-key", "a/b"]).exit_code == 2


def test_by_default_a_port_is_for_its_own_kind() -> None:
    router, decode = built(RouterSettings), built(DecodeSettings)
    assert router.gate.anonymous is Who.CLIENT
    assert decode.gate.anonymous is Who.PEER
    assert router.admin_gate.anonymous is decode.admin_gate.anonymous is Who.OPERATOR
    assert router.credentials is None


def test_a_certificate_alone_is_not_enough_where_keys_are_asked_for(ca: ThrowawayCa, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"acme = {digest_of('key')}\n")
    cert = ca.issue("server")
    given = {"tls_cert": cert.cert, "tls_key": cert.key, "tls_client_ca": ca.ca, "tls_client_names": "a, b"}
    gate = built(RouterSettings, api_keys=keys, **given).gate
    assert gate.anonymous is Who.NOBODY
    assert gate.names == {"a", "b"}
    assert gate.tenant_of is None, "the key says whose it is"
    alone = built(RouterSettings, **given).gate
    assert alone.tenant_of is not None
    assert (alone.tenant_of("acme"), alone.tenant_of("*")) != (None, None)
    assert alone.tenant_of("*") is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tls_cert": "c.pem"}, "--tls-cert, --tls-key"),
        ({"tls_client_ca": "c.pem"}, "--tls-client-ca: needs"),
        ({"tls_client_names": "a"}, "--tls-client-names: needs"),
        ({"mesh_tls_name": "a"}, "need --mesh-ca"),
        ({"mesh_cert": "c", "mesh_key": "k"}, "need --mesh-ca"),
        ({"jwt_key_file": "k"}, "--jwt-key-file: needs"),
        ({"jwt_issuer": "us"}, "need --jwt-key-file"),
        ({"salt_secret": "a", "salt_secret_file": "f"}, "only one may give a secret"),
    ],
)
def test_settings_that_need_each_other(given: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RouterSettings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "short", "x" * 31, "with a space in the middle of it, that is", "ü" * 40])
def test_a_token_that_could_be_guessed_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(CannotStart, match="--mesh-token-file: ") as caught:
        built(DecodeSettings, mesh_token_file=file)
    assert not content or content not in str(caught.value)
    with pytest.raises(CannotStart, match="only one may give"):
        built(DecodeSettings, mesh_token_file=file, mesh_token=TOKEN)


@pytest.mark.usefixtures("eager")
def test_a_token_is_replaced_in_two_steps(tmp_path: Path) -> None:
    file = tmp_path / "token"
    old, new = "o" * 32, "n" * 32
    file.write_text(f"{old}\n")
    gate = built(DecodeSettings, mesh_token_file=file).gate

    def passes(token: str) -> bool:
        try:
            return bool(gate.examine(DECODE, ((MESH_HEADER, token),)))
        except Unauthenticated:
            return False

    for text, expected in ((f"{old}\n{new}", (True, True)), (new, (False, True)), ("broken", (False, True))):
        file.write_text(text)
        assert (passes(old), passes(new)) == expected


@pytest.mark.parametrize(
    ("kind", "arguments", "flag"),
    [
        (DecodeSettings, ["--mesh-token", TOKEN], "--mesh-token"),
        (DecodeSettings, [f"--admin-token={TOKEN}"], "--admin-token"),
        (DecodeSettings, [f"--mesh_token={TOKEN}"], "--mesh_token"),
        (CacheSettings, ["--key-secret", "x"], "--key-secret"),
        (CacheSettings, ["--redis-password", "x"], "--redis-password"),
        (CacheSettings, ["--redis-url", "redis://:pw@host"], "--redis-url"),
        (CacheSettings, ["--redis-url=rediss://user:pw@host"], "--redis-url"),
        (CacheSettings, ["--redis-url", "redis://host", "--listen", "127.0.0.1:1"], None),
        (CacheSettings, ["--redis-url", "nonsense"], None),
        (RouterSettings, ["--salt-secret", "x"], "--salt-secret"),
        (RouterSettings, ["--api-keys", "file", "--mesh-token-file", "file"], None),
    ],
)
def test_secrets_are_no_flags(
    kind: type[RouterSettings | DecodeSettings | CacheSettings], arguments: list[str], flag: str | None
) -> None:
    assert kind.secret_in(arguments) == flag


@pytest.mark.parametrize(
    ("service", "arguments", "environment", "code", "says"),
    [
        ("cache", ["--mesh-token", TOKEN], {}, 2, "give it as BATON_MESH_TOKEN, or in a file"),
        ("cache", ["--mesh-tok", "x" * 32], {}, 2, "unrecognized arguments"),
        ("cache", ["--listen", EVERYWHERE], {}, 1, "whoever reaches this port"),
        ("cache", [], {"BATON_MESH_TOKEN": "short-secret"}, 1, "a token must be 32"),
    ],
)
async def test_a_service_says_what_it_does_not_start_with(
    service: str, arguments: list[str], environment: dict[str, str], code: int, says: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"baton_{service}", *arguments, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, says in output.decode()) == (code, True), output.decode()
    assert TOKEN not in output.decode()
    assert "short-secret" not in output.decode()
    assert "Traceback" not in output.decode()
