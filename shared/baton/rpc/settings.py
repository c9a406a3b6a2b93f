"""Settings every service has: flags first, then BATON_* environment variables, then defaults."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from baton.rpc.security_settings import SecuritySettings


class ServiceSettings(SecuritySettings):
    """Common to all services. Each service adds its own; `--help` lists them all."""

    model_config = SettingsConfigDict(
        env_prefix="BATON_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="ignore",
        hide_input_in_errors=True,  # what is wrong may be a secret
    )

    listen: str = Field("127.0.0.1:0", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_listen: str = Field("127.0.0.1:0", description="host:port of the Prometheus endpoint; empty: none")
    ready_file: Path | None = Field(None, description="JSON with addresses and pid is written here once serving")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    drain_seconds: float = Field(30.0, ge=0, description="how long running requests may take to finish on SIGTERM")
    caller_silence_seconds: float = Field(
        2.0, ge=0.2, description="a caller that does not answer pings for this long is gone, and its calls end"
    )
    otlp_endpoint: str = Field(
        "", description="OpenTelemetry collector, host:port of its gRPC receiver; empty: no traces"
    )
    trace_ratio: float = Field(1.0, ge=0, le=1, description="share of requests traced, when the caller did not decide")
