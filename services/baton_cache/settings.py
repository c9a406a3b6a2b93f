"""Settings of the cache service."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict
from redis.asyncio.connection import parse_url

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
    key_prefix: str = Field("baton:answer:", description="what the name of every entry begins with")
    default_ttl_seconds: float = Field(24 * 3600.0, gt=0, description="how long an answer may be served by default")
    max_ttl_seconds: float = Field(30 * 24 * 3600.0, gt=0, description="how long an answer may be served at most")
    max_answer_bytes: int = Field(1024 * 1024, ge=1, description="largest value; larger ones are not stored")

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: SecretStr) -> SecretStr:
        try:
            parse_url(url.get_secret_value())
        except ValueError:
            raise ValueError("must be a redis://, rediss:// or unix:// URL") from None
        return url
