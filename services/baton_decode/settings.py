"""Settings of the decode service."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from baton.worker.settings import WorkerSettings
from baton_decode.links import KvCodecChoice
from baton_decode.placement import Policy, PrefillPlacement

_LOCAL_TOKENS = 64


class DecodeSettings(WorkerSettings):
    """`python -m baton_decode`: runs requests to their end, batched, with prompts computed here or by prefill."""

    model_config = SettingsConfigDict(cli_prog_name="python -m baton_decode")

    prefill_placement: PrefillPlacement | None = Field(
        None,
        description="where prompts are computed: auto, where that costs least; local, here; remote, by a prefill "
        "service while there is one; threshold, here up to local_prefill_tokens. Default: auto, or threshold if "
        "local_prefill_tokens is given",
    )
    local_prefill_tokens: int | None = Field(
        None, ge=0, description="most tokens, without those cached, that threshold computes here; 64 if not given"
    )
    placement_harm_weight: float = Field(
        1.0, ge=0, description="auto: a second that a running stream waits counts as so many of the request's own"
    )
    placement_slack: float = Field(
        0.05, ge=0, description="auto: a first token may come this share later than it could, to spare running streams"
    )
    handoff_credit_bytes: int = Field(
        8 * 1024 * 1024,
        ge=1024 * 1024,
        description="most KV bytes in flight to one request over gRPC; a slow link gets less",
    )
    kv_codec: KvCodecChoice = Field(
        KvCodecChoice.RAW,
        description="KV that comes over gRPC: raw, bit for bit; int8, half the bytes and not exact; "
        "auto, int8 where the measured link is so slow that it pays",
    )
    messages_per_second: int = Field(
        0,
        ge=0,
        description="messages with tokens, of all streams together, above which the tokens of a stream share messages; "
        "0: 80 for each core the service may use",
    )
    prefill_silence_seconds: float = Field(
        2.5, gt=0, description="a prefill call that says nothing for this long is given up; it should every 0.1 s"
    )
    trial_seconds: float = Field(
        10.0, gt=0, description="a request that may have broken an engine holds other such requests up for so long"
    )

    def placement(self) -> PrefillPlacement:
        """Who decides where prompts are computed."""
        if self.prefill_placement is not None:
            return self.prefill_placement
        return PrefillPlacement.AUTO if self.local_prefill_tokens is None else PrefillPlacement.THRESHOLD

    def threshold(self) -> int:
        """Most missing tokens that are computed here, where their number decides."""
        return _LOCAL_TOKENS if self.local_prefill_tokens is None else self.local_prefill_tokens

    def policy(self) -> Policy:
        """How auto weighs."""
        return Policy(self.placement_harm_weight, self.placement_slack)
