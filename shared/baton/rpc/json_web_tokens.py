"""JSON Web Tokens (RFC 7519) as clients' credentials: one algorithm, one issuer, one audience, an end. Keys come from a
file; nothing is ever fetched. PyJWT, the extra `jwt`, does the cryptography.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from baton.rpc.api_keys import usable_tenant
from baton.rpc.caller import Caller
from baton.rpc.reloaded import Reloaded, UnusableFile

_LEAST_SECRET_BYTES: Final = 32
_LEAST_RSA_BITS: Final = 2048
_END: Final = b"-----END PUBLIC KEY-----"


class JwtAlgorithm(enum.StrEnum):
    """How tokens are signed. A token that says another one is refused, whatever it is."""

    HS256 = "HS256"
    RS256 = "RS256"
    ES256 = "ES256"


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtRules:
    """What a token has to say, beside having a signature that fits."""

    algorithm: JwtAlgorithm
    issuer: str
    audience: str
    tenant_claim: str
    leeway_seconds: float
    """How far clocks may be apart."""

    def __post_init__(self) -> None:
        assert self.issuer
        assert self.audience
        assert self.tenant_claim


class JsonWebTokens:
    """Verifies tokens.

    Args:
        path: PEM public keys, or for HS256 the secret; read again when it changes.
        rules: what a token has to say.

    Raises:
        OSError, UnusableFile: the file cannot be read, or its keys are not for this algorithm.
        ImportError: the extra `jwt` is not installed.
    """

    def __init__(self, path: Path, rules: JwtRules) -> None:
        import jwt  # an extra, for those who use it

        self._jwt = jwt
        self._rules = rules
        self._keys = Reloaded("--jwt-key-file", (path,), lambda: load_keys(path.read_bytes(), rules.algorithm))

    def verify(self, token: str) -> Caller | None:
        """Who the token says it is; None: it is not to be believed."""
        for key in self._keys.get():
            try:
                claims = self._jwt.decode(
                    token,
                    key,
                    algorithms=[self._rules.algorithm.value],
                    issuer=self._rules.issuer,
                    audience=self._rules.audience,
                    leeway=self._rules.leeway_seconds,
                    options={"require": ["exp", "iss", "aud"]},
                )
            except self._jwt.InvalidSignatureError:
                continue
            except (self._jwt.PyJWTError, ValueError, RecursionError):  # a header may be any JSON, however deep
                return None
            return self._caller(claims)
        return None

    def _caller(self, claims: dict[str, Any]) -> Caller | None:
        tenant, subject = claims.get(self._rules.tenant_claim), claims.get("sub", "")
        if not isinstance(tenant, str) or not usable_tenant(tenant):
            return None
        return Caller(tenant, subject if isinstance(subject, str) else "")


def load_keys(content: bytes, algorithm: JwtAlgorithm) -> tuple[Any, ...]:
    """The keys in a file: one, or several while they are replaced.

    Raises:
        UnusableFile: it has none, or one that is not for the algorithm.
    """
    if algorithm is JwtAlgorithm.HS256:
        secret = content.strip()
        if b"-----BEGIN" in secret or secret.startswith((b"ssh-", b"ecdsa-")):
            # Whoever knows the public key could sign with it.
            raise UnusableFile("HS256 needs a secret, and this is a key pair's")
        if len(secret) < _LEAST_SECRET_BYTES:
            raise UnusableFile(f"HS256 needs a secret of at least {_LEAST_SECRET_BYTES} bytes")
        return (secret,)
    keys = tuple(_public_key(part + _END, algorithm) for part in content.split(_END)[:-1])
    if not keys:
        raise UnusableFile("has no PEM public key")
    return keys


def _public_key(pem: bytes, algorithm: JwtAlgorithm) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableFile("has something that is no PEM public key") from None
    if algorithm is JwtAlgorithm.RS256:
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < _LEAST_RSA_BITS:
            raise UnusableFile(f"RS256 needs RSA keys of at least {_LEAST_RSA_BITS} bits")
    elif not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UnusableFile("ES256 needs keys on the curve P-256")
    return key
