"""Settings of the cache service."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from redis.asyncio.connection import parse_url

from baton.rpc.service import CannotStart
from baton.rpc.settings import ServiceSettings


class CacheSettings(ServiceSettings):
    """`python -m baton_cache`: the response cache, kept in Redis."""

    # What is wrong with a URL can be said without repeating the password in it.
    model_config = SettingsConfigDict(cli_prog_name="python -m baton_cache", hide_input_in_errors=True)

    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://, rediss:// or unix:// URL; with a password in it, better given as BATON_REDIS_URL",
    )
    redis_timeout: float = Field(
        0.02, gt=0, description="longest wait for Redis, seconds, connecting included; after it: a miss"
    )
    redis_connections: int = Field(32, ge=1, description="most connections to Redis")
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
    max_answer_bytes: int = Field(1024 * 1024, ge=1, description="largest value; larger ones are not stored")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: SecretStr) -> SecretStr:
        try:
            parse_url(url.get_secret_value())
        except ValueError:
            raise ValueError("must be a redis://, rediss:// or unix:// URL") from None
        return url

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if self.key_secret.get_secret_value() and self.key_secret_file is not None:
            raise ValueError("--key-secret and --key-secret-file: give one of them")
        return self

    def secret(self) -> bytes:
        """What names are keyed with; empty: nothing.

        Raises:
            CannotStart: the file cannot be read, or is empty.
        """
        if self.key_secret_file is None:
            return self.key_secret.get_secret_value().encode()
        return read_secret(self.key_secret_file, "--key-secret-file").encode()


def read_secret(path: Path, flag: str) -> str:
    """The text of a file, without the space around it.

    Raises:
        CannotStart: it cannot be read, or is empty.
    """
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"{flag}: cannot be read: {type(error).__name__}") from None
    if not secret:
        raise CannotStart(f"{flag}: is empty")
    return secret
