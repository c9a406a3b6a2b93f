"""What the gate and TLS cost: a unary call and a stream of small messages, in one process, over loopback.

    python scripts/measure_security.py [--calls 2000] [--messages 20000] [--rounds 5]

Figures are processor time of both sides together, which a busy machine disturbs least: medians of rounds, each of which
measures all ways after one another.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from baton.cli.throwaway_ca import ThrowawayCa
from baton.rpc.access import Who
from baton.rpc.api_keys import ApiKeys, digest_of, new_key
from baton.rpc.channel import MESH_CHANNEL_OPTIONS, PLAIN, SERVER_OPTIONS
from baton.rpc.dialer import Dialer
from baton.rpc.gate import Gate
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.json_web_tokens import JsonWebTokens, JwtAlgorithm, JwtRules
from baton.rpc.mesh_token import MESH_HEADER
from baton.rpc.tls import TlsFiles, server_credentials, watched

UNARY, STREAM = "/baton.v1.Inference/Generate", "/baton.v1.Inference/StreamGenerate"
MESSAGE = bytes(64)  # about what a token takes


@dataclass(frozen=True)
class Way:
    """One way to call: the server's gate and certificates, and what a caller needs."""

    name: str
    gate: Gate
    metadata: tuple[tuple[str, str], ...] = ()
    server: TlsFiles | None = None
    dialer: Dialer = PLAIN


def ways(directory: Path) -> list[Way]:
    """All that are measured."""
    key, mesh = new_key(), "m" * 64
    (directory / "keys").write_text(
        "".join(f"t{i} = {digest_of(f'{i}')}\n" for i in range(1000)) + f"acme = {digest_of(key)}\n"
    )
    signer = ec.generate_private_key(ec.SECP256R1())
    pem = signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (directory / "jwt.pem").write_bytes(pem)
    rules = JwtRules(algorithm=JwtAlgorithm.ES256, issuer="us", audience="b", tenant_claim="tenant", leeway_seconds=0)
    token = jwt.encode({"iss": "us", "aud": "b", "exp": 2**33, "tenant": "acme"}, signer, "ES256")
    ca = ThrowawayCa(directory)
    pair = ca.issue("server", ["baton-mesh"], ["127.0.0.1"])
    own = TlsFiles(cert=pair.cert, key=pair.key)
    mutual = TlsFiles(cert=pair.cert, key=pair.key, ca=ca.ca)
    keys, tokens = ApiKeys(directory / "keys"), JsonWebTokens(directory / "jwt.pem", rules)
    anyone = Gate(anonymous=Who.CLIENT)
    trusting = Dialer(watched("ca", TlsFiles(ca=ca.ca)))
    return [
        Way("plain text, nobody asked", anyone),
        Way("an API key among 1,001", Gate(anonymous=Who.NOBODY, clients=[keys.verify]), bearer(key)),
        Way("a token signed with ES256", Gate(anonymous=Who.NOBODY, clients=[tokens.verify]), bearer(token)),
        Way(
            "a mesh token as well",
            Gate(anonymous=Who.CLIENT, peers=lambda: (mesh,)),
            ((MESH_HEADER, mesh),),
        ),
        Way("TLS", anyone, (), own, trusting),
        Way(
            "mutual TLS, names looked at",
            Gate(anonymous=Who.CLIENT, names=frozenset({"baton-mesh"})),
            (),
            mutual,
            Dialer(watched("mutual", mutual)),
        ),
    ]


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a client."""
    return (("authorization", f"Bearer {credential}"),)


async def unary(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """Echo."""
    return request


async def measure(way: Way, calls: int, messages: int) -> tuple[float, float]:
    """Microseconds of processor time of a call, and of a message of a stream."""

    async def stream(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        for _ in range(messages):
            yield MESSAGE

    server = grpc.aio.server(interceptors=[RimInterceptor(gate=way.gate)], options=SERVER_OPTIONS)
    handlers = {
        "Generate": grpc.unary_unary_rpc_method_handler(unary),
        "StreamGenerate": grpc.unary_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("baton.v1.Inference", handlers)])
    listen = "127.0.0.1:0"
    if way.server is None:
        port = server.add_insecure_port(listen)
    else:
        port = server.add_secure_port(listen, server_credentials(watched("own", way.server)))
    await server.start()
    async with way.dialer.dial(f"127.0.0.1:{port}", MESH_CHANNEL_OPTIONS) as channel:
        call, streaming = channel.unary_unary(UNARY), channel.unary_stream(STREAM)
        for _ in range(50):
            await call(MESSAGE, metadata=way.metadata)
        start = time.process_time()
        for _ in range(calls):
            await call(MESSAGE, metadata=way.metadata)
        of_call = (time.process_time() - start) / calls
        start = time.process_time()
        count = 0
        async for _ in streaming(MESSAGE, metadata=way.metadata):
            count += 1
        of_message = (time.process_time() - start) / messages
        assert count == messages
    await server.stop(0)
    return of_call * 1e6, of_message * 1e6


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--messages", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measured = ways(Path(directory))
        rounds = [
            [await measure(way, options.calls, options.messages) for way in measured] for _ in range(options.rounds)
        ]
    print("| way | a call, us | more | a message of a stream, us | more |")
    print("|---|---:|---:|---:|---:|")
    figures = [[statistics.median(r[i][j] for r in rounds) for j in range(2)] for i in range(len(measured))]
    for way, (of_call, of_message) in zip(measured, figures, strict=True):
        more, more_of_message = of_call - figures[0][0], of_message - figures[0][1]
        print(f"| {way.name} | {of_call:.0f} | {more:+.0f} | {of_message:.1f} | {more_of_message:+.1f} |")


if __name__ == "__main__":
    asyncio.run(main())
