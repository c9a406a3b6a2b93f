"""What `baton up` starts, as plain values: which services, with which flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SERVICES: Final = ("cache", "prefill", "decode", "router")
_ENGINES: Final = ("prefill", "decode")


class BadSetting(ValueError):
    """A --set that is not SERVICE.FLAG=VALUE."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One mesh on this machine."""

    model: Path
    prefill: int
    """Prefill workers, 0 or more: with none, decode computes all prompts."""
    decode: int
    """Decode workers, 1 or more."""
    listen: str
    """host:port of the router."""
    redis_url: str
    """Redis to use; empty: an embedded one."""
    model_name: str = ""
    drain_seconds: float = 10.0
    engine: Mapping[str, str] = field(default_factory=dict)
    """Flags of both engine tiers, without dashes in front: {"dtype": "bfloat16"}."""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More flags by service, ready for its command line."""
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More environment variables by service."""
    tls: bool = False
    """Every connection is TLS, between services mutual, with a CA of this mesh."""

    def __post_init__(self) -> None:
        assert self.prefill >= 0
        assert self.decode >= 1

    @property
    def served_name(self) -> str:
        """The name clients call the model by."""
        return self.model_name or self.model.resolve().name

    def worker_names(self) -> list[tuple[str, str]]:
        """(name, service) of every engine."""
        return [
            *((f"prefill-{index}", "prefill") for index in range(self.prefill)),
            *((f"decode-{index}", "decode") for index in range(self.decode)),
        ]

    def cache_arguments(self) -> list[str]:
        """Flags of the cache service. Not Redis' URL: it may hold a password, and anyone can read flags."""
        return [*self._common("127.0.0.1:0"), *self.extra.get("cache", ())]

    def has_key_secret(self, environment: Mapping[str, str]) -> bool:
        """Whether somebody chose the secret that names in Redis are keyed with; else one is drawn for this run."""
        chosen = {**environment, **self.environment.get("cache", {})}
        return any(chosen.get(name) for name in ("BATON_KEY_SECRET", "BATON_KEY_SECRET_FILE")) or any(
            flag.startswith("--key-secret") for flag in self.extra.get("cache", ())
        )

    def worker_arguments(self, service: str) -> list[str]:
        """Flags of a prefill or decode worker."""
        assert service in _ENGINES
        flags = [*self._common("127.0.0.1:0"), *self._model_flags()]
        for name, value in self.engine.items():
            flags += [f"--{name}", value]
        return [*flags, *self.extra.get(service, ())]

    def router_arguments(self, decode: list[str], prefill: list[str], cache: str) -> list[str]:
        """Flags of the router, once the others' addresses are known."""
        flags = [*self._common(self.listen), *self._model_flags(), "--decode-targets", ",".join(decode)]
        if prefill:
            flags += ["--prefill-targets", ",".join(prefill)]
        return [*flags, "--cache-target", cache, *self.extra.get("router", ())]

    def _common(self, listen: str) -> list[str]:
        return ["--listen", listen, "--metrics-listen", "127.0.0.1:0", "--drain-seconds", f"{self.drain_seconds:g}"]

    def _model_flags(self) -> list[str]:
        return ["--model", str(self.model), "--model-name", self.served_name]


def parse_settings(settings: list[str]) -> dict[str, tuple[str, ...]]:
    """`decode.max-waiting=5` and the like as flags by service; `decode.prefix-cache=false` is `--no-prefix-cache`.

    Raises:
        BadSetting: not of that form, or no such service.
    """
    parsed: dict[str, tuple[str, ...]] = {}
    for setting in settings:
        where, equals, value = setting.partition("=")
        service, dot, flag = where.partition(".")
        if not equals or not dot or not flag:
            raise BadSetting(f"{setting!r} is not SERVICE.FLAG=VALUE, for example decode.max-waiting=5")
        if service not in SERVICES:
            raise BadSetting(f"{setting!r}: no service {service!r}; there are {', '.join(SERVICES)}")
        flag = flag.replace("_", "-")
        switch = {"true": (f"--{flag}",), "false": (f"--no-{flag}",)}
        parsed[service] = (*parsed.get(service, ()), *switch.get(value, (f"--{flag}", value)))
    return parsed
