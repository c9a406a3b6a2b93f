"""Settings of the router."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from baton.models import bundled_model
from baton.rpc.access import Who
from baton.rpc.api_keys import ApiKeys
from baton.rpc.cannot_start import CannotStart
from baton.rpc.gate import Verify
from baton.rpc.json_web_tokens import JsonWebTokens, JwtAlgorithm, JwtRules
from baton.rpc.reloaded import UnusableFile, reason
from baton.rpc.secret_file import read_secret
from baton.rpc.settings import ServiceSettings
from baton_router.models import parse_models
from baton_router.placement import Strategy


class RouterSettings(ServiceSettings):
    """`python -m baton_router`: the public API; checks, tokenizes, places, streams."""

    model_config = SettingsConfigDict(cli_prog_name="python -m baton_router")
    serves: ClassVar[Who] = Who.CLIENT

    model: Annotated[list[str], NoDecode] = Field(
        default_factory=lambda: [str(bundled_model())],
        description="model directory, or name=directory; several, each with the option or comma separated, are served "
        "side by side, and the first one is the default; default: the bundled tiny model",
    )
    model_name: str = Field("", description="name clients call a single model by; default: the directory's name")
    decode_targets: str = Field(
        "", description="decode workers, comma separated: host:port, or dns:///name:port for every address of a name"
    )
    prefill_targets: str = Field("", description="prefill workers, as decode_targets; empty: decode computes prompts")
    cache_target: str = Field(
        "", description="replicas of the cache service, as decode_targets; empty: no response cache"
    )

    max_prompt_bytes: int = Field(1024 * 1024, ge=1, description="longest prompt or conversation, bytes as sent")
    max_messages: int = Field(1024, ge=1, description="most messages of a conversation")
    max_in_flight: int = Field(1024, ge=1, description="requests served at once; more are refused")
    max_queue_requests: int = Field(
        512, ge=1, description="requests that may wait for a place at the workers, per model; more are refused"
    )
    max_queue_tokens: int = Field(
        1_000_000, ge=1, description="tokens these may have, prompts and expected answers together"
    )
    max_queue_seconds: float = Field(
        30.0, gt=0, description="longest wait for a place; who would wait longer is refused at once"
    )
    aging_seconds: float = Field(
        0.1, ge=0, le=10, description="waiting so long counts as much as one level of priority, within a tenant"
    )
    prefill_ahead_seconds: float = Field(
        1.0, gt=0, description="prompts that may wait at the workers, in seconds of their time; others wait here"
    )
    tenants_file: Path | None = Field(
        None, description="TOML with the limits and weights of tenants; default: none has any"
    )
    tenants_reload_seconds: float = Field(5.0, gt=0, description="how often it is looked at for changes")
    max_unsent_tokens: int = Field(
        1024, ge=1, description="tokens that may wait for a client that does not read, per stream"
    )
    max_request_seconds: float = Field(3600.0, gt=0, description="longest request, whatever its deadline")

    max_migrations: int = Field(3, ge=0, description="times a request may move to another decode worker")
    retry_share: float = Field(
        0.2, ge=0, le=1, description="requests tried elsewhere after a refusal, as a share of all; lost workers aside"
    )
    # Clients are further away than services are from each other.
    caller_silence_seconds: float = Field(
        7.0, ge=0.2, description="a client that does not answer pings for this long is gone, and its calls end"
    )
    reattach_seconds: float = Field(
        0.8, ge=0, description="how long a request without a decode worker waits for one to come back"
    )
    deadline_margin_seconds: float = Field(
        0.02, ge=0, description="what decode's deadline is shorter by than the client's; the router's is by half of it"
    )
    worker_silence_seconds: float = Field(
        2.5, gt=0.2, description="a worker whose state stream says nothing for this long is lost"
    )
    resolve_seconds: float = Field(1.0, gt=0, description="how often dns:/// targets are resolved again")

    routing: Strategy = Field(
        Strategy.PREFIX,
        description="what chooses workers: prefix: time to the first token by what their prefix caches hold; hash: the "
        "prompt's beginning, without their telling; load: queued work alone",
    )
    routing_slack_seconds: float = Field(
        0.002, ge=0, description="first tokens so much apart count as equally early; the prompt's beginning decides"
    )
    routing_bound: float = Field(
        1.25, ge=1, description="hash: a worker's queue may be so many times the mean before another takes its prompts"
    )

    kept_records: int = Field(1000, ge=1, description="latest requests whose ledger is kept for `baton trace`")
    follow_silence_seconds: float = Field(
        30.0, gt=0, description="a request that shares another router's generation goes on alone after such a silence"
    )
    cache_similar_timeout_seconds: float = Field(
        0.25, gt=0, description="longest wait for the cache where cache_control.semantic is set; after it: a miss"
    )
    # Five times what the cache gives Redis: a cache that is alive answers in time, also where it waits for a core.
    cache_timeout_seconds: float = Field(0.1, gt=0, description="longest wait for the cache; after it: a miss")
    record_prompts: bool = Field(
        False, description="put the text of prompts and answers into traces; whoever reads traces reads them"
    )
    record_prompts_bytes: int = Field(
        4096, ge=256, le=8192, description="bytes recorded of a prompt, and of an answer; more is cut"
    )

    api_keys: Path | None = Field(
        None, description="file with a line `TENANT = SHA-256 of a key` for each key; `baton new-key` makes one"
    )
    jwt_key_file: Path | None = Field(
        None, description="clients may bring JSON Web Tokens: PEM public keys that verify them, or the secret for HS256"
    )
    jwt_algorithm: JwtAlgorithm | None = Field(None, description="how they are signed: RS256, ES256 or HS256")
    jwt_issuer: str = Field("", description="their iss")
    jwt_audience: str = Field("", description="their aud")
    jwt_tenant_claim: str = Field("tenant", min_length=1, description="the claim that holds the tenant")
    jwt_leeway_seconds: float = Field(10.0, ge=0, le=300, description="how far clocks may be apart")
    salt_secret: SecretStr = Field(
        SecretStr(""),
        description="secret that tenants' prefix caches are told apart with; routers that have it in common share "
        "them; from the environment: BATON_SALT_SECRET. Default: drawn at start",
    )
    salt_secret_file: Path | None = Field(None, description="file with that secret")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        rules = (self.jwt_algorithm, self.jwt_issuer, self.jwt_audience)
        if self.jwt_key_file is not None and not all(rules):
            raise ValueError("--jwt-key-file: needs --jwt-algorithm, --jwt-issuer and --jwt-audience")
        if self.jwt_key_file is None and any(rules):
            raise ValueError("--jwt-algorithm, --jwt-issuer, --jwt-audience: need --jwt-key-file")
        if self.salt_secret.get_secret_value() and self.salt_secret_file is not None:
            raise ValueError("--salt-secret, --salt-secret-file: only one may give a secret")
        return self

    def clients(self) -> Sequence[Verify]:
        """API keys first: they are looked up faster than a signature is verified."""
        found: list[Verify] = []
        try:
            if self.api_keys is not None:
                found.append(ApiKeys(self.api_keys).verify)
        except (OSError, UnusableFile) as error:
            raise CannotStart(f"--api-keys: {reason(error)}") from None
        try:
            if self.jwt_key_file is not None and self.jwt_algorithm is not None:
                rules = JwtRules(
                    algorithm=self.jwt_algorithm,
                    issuer=self.jwt_issuer,
                    audience=self.jwt_audience,
                    tenant_claim=self.jwt_tenant_claim,
                    leeway_seconds=self.jwt_leeway_seconds,
                )
                found.append(JsonWebTokens(self.jwt_key_file, rules).verify)
        except (OSError, UnusableFile) as error:
            raise CannotStart(f"--jwt-key-file: {reason(error)}") from None
        except ImportError:
            raise CannotStart("--jwt-key-file: needs the extra `jwt`, which is not installed") from None
        return found

    def salt_key(self) -> bytes:
        """What salts of prefix caches are keyed with.

        Raises:
            CannotStart: the file cannot be read, or is empty.
        """
        if self.salt_secret_file is not None:
            return read_secret(self.salt_secret_file, "--salt-secret-file").encode()
        return self.salt_secret.get_secret_value().encode() or secrets.token_bytes(32)

    @field_validator("model", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """A list as it is, a comma-separated one in parts, a directory alone."""
        if isinstance(value, str):
            return [value] if Path(value).is_dir() else targets(value)
        return [str(value)] if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.model_name and len(self.model) > 1:
            raise ValueError("model_name is for a single model; name several as in --model name=directory")
        self.models()
        return self

    def models(self) -> list[tuple[str, Path]]:
        """Names and directories of the models, the default first."""
        return parse_models(self.model, self.model_name)


def targets(text: str) -> list[str]:
    """The parts of a comma-separated list of targets, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
