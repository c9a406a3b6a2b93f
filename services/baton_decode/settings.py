"""Settings of the decode service."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from baton.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """`python -m baton_decode`: runs requests to their end, batched, with prompts computed here or by prefill."""

    model_config = SettingsConfigDict(cli_prog_name="python -m baton_decode")

    local_prefill_tokens: int = Field(
        64, ge=0, description="prompts up to this many tokens are computed here; longer ones by a prefill service"
    )
    handoff_credit_bytes: int = Field(
        1024 * 1024,
        ge=1024 * 1024,
        # The first token, and the keepalive that must be answered within a second, wait behind what is in flight.
        description="KV bytes a prefill service may have in flight to one request; more only pays on long, fast links",
    )
    prefill_silence_seconds: float = Field(
        30.0, gt=0, description="a prefill call that says nothing for this long is given up"
    )
