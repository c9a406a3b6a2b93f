"""JSON Web Tokens: only those of our issuer, for us, in time, signed as agreed."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from baton.rpc.caller import Caller
from baton.rpc.json_web_tokens import JsonWebTokens, JwtAlgorithm, JwtRules, load_keys
from baton.rpc.reloaded import UnusableFile

SECRET = b"0123456789abcdef0123456789abcdef"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY, EC_OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def public(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def claims(**changed: Any) -> dict[str, Any]:
    whole = {"iss": "us", "aud": "baton", "exp": time.time() + 3600, "tenant": "acme", "sub": "ann"} | changed
    return {name: value for name, value in whole.items() if value is not None}


def verifier(directory: Path, content: bytes, algorithm: JwtAlgorithm) -> JsonWebTokens:
    file = directory / "keys.pem"
    file.write_bytes(content)
    rules = JwtRules(algorithm=algorithm, issuer="us", audience="baton", tenant_claim="tenant", leeway_seconds=5)
    return JsonWebTokens(file, rules)


@pytest.mark.parametrize(
    ("algorithm", "content", "key"),
    [
        (JwtAlgorithm.HS256, SECRET + b"\n", SECRET),
        (JwtAlgorithm.RS256, public(RSA_KEY), RSA_KEY),
        (JwtAlgorithm.ES256, public(EC_KEY), EC_KEY),
        (JwtAlgorithm.ES256, public(EC_OTHER) + public(EC_KEY), EC_KEY),
    ],
)
def test_a_good_token_says_who_calls(tmp_path: Path, algorithm: JwtAlgorithm, content: bytes, key: Any) -> None:
    tokens = verifier(tmp_path, content, algorithm)
    assert tokens.verify(jwt.encode(claims(), key, algorithm.value)) == Caller("acme", "ann")
    assert tokens.verify(jwt.encode(claims(aud=["x", "baton"], sub=None), key, algorithm.value)) == Caller("acme", "")
    assert tokens.verify(jwt.encode(claims(exp=time.time() - 2), key, algorithm.value)) is not None, "clocks differ"


@pytest.mark.parametrize(
    "changed",
    [
        {"exp": time.time() - 3600},
        {"exp": None},
        {"exp": "soon"},
        {"nbf": time.time() + 86400},
        {"iss": "them"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": ["acme"]},
        {"tenant": "a/b"},
        {"tenant": "*"},
        {"tenant": "x" * 65},
    ],
)
def test_a_token_that_says_something_else_is_not_believed(tmp_path: Path, changed: dict[str, Any]) -> None:
    tokens = verifier(tmp_path, public(EC_KEY), JwtAlgorithm.ES256)
    assert tokens.verify(jwt.encode(claims(**changed), EC_KEY, "ES256")) is None


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_another_signature_or_algorithm_is_not_believed(tmp_path: Path) -> None:
    tokens = verifier(tmp_path, public(EC_KEY), JwtAlgorithm.ES256)
    good = jwt.encode(claims(), EC_KEY, "ES256")
    head, body, signature = good.split(".")
    forged = _part(claims(tenant="globex"))
    for wrong in (
        jwt.encode(claims(), EC_OTHER, "ES256"),
        jwt.encode(claims(), RSA_KEY, "RS256"),
        f"{_part({'alg': 'none', 'typ': 'JWT'})}.{body}.",
        f"{_part({'alg': 'None'})}.{body}.",
        f"{_part({'alg': 'HS256'})}.{body}.{signature}",
        f"{_part({'alg': 'ES256', 'jku': 'http://127.0.0.1/', 'kid': '../../dev/null'})}.{body}.{signature}",
        f"{head}.{forged}.{signature}",
        f"{head}.{body}.",
        f"{head}.{body}",
        head,
        "",
        "..",
        "é.é.é",
        f"{_part([])}.{body}.{signature}",
        base64.urlsafe_b64encode(b"[" * 6000).decode() + f".{body}.{signature}",
    ):
        assert tokens.verify(wrong) is None, wrong[:80]


def test_the_public_key_is_no_secret_to_sign_with(tmp_path: Path) -> None:
    """Key confusion: a server that takes what the header says would take this."""
    tokens = verifier(tmp_path, public(RSA_KEY), JwtAlgorithm.RS256)
    import hashlib
    import hmac

    signed = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims())}"
    mac = hmac.new(public(RSA_KEY), signed.encode(), hashlib.sha256).digest()
    assert tokens.verify(f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}") is None


@pytest.mark.parametrize(
    ("algorithm", "content"),
    [
        (JwtAlgorithm.HS256, b"short"),
        (JwtAlgorithm.HS256, public(EC_KEY)),
        (JwtAlgorithm.HS256, b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI ann@example"),
        (JwtAlgorithm.RS256, public(EC_KEY)),
        (JwtAlgorithm.RS256, public(rsa.generate_private_key(65537, 1024))),
        (JwtAlgorithm.RS256, SECRET),
        (JwtAlgorithm.RS256, b""),
        (JwtAlgorithm.ES256, public(RSA_KEY)),
        (JwtAlgorithm.ES256, public(ec.generate_private_key(ec.SECP384R1()))),
        (JwtAlgorithm.ES256, public(EC_KEY) + b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
        (
            JwtAlgorithm.ES256,
            EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        ),
    ],
)
def test_keys_that_are_not_for_the_algorithm_are_refused(algorithm: JwtAlgorithm, content: bytes) -> None:
    with pytest.raises(UnusableFile):
        load_keys(content, algorithm)
