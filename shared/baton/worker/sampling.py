"""From the wire's sampling parameters to the engine's. The router has filled every field in."""

from __future__ import annotations

from baton.engine.messages import FinishReason, SamplingParams
from baton.rpc.errors import InvalidArgument
from baton.v1 import sampling_pb2

_REQUIRED = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)

FINISH_REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
}


def engine_sampling(sampling: sampling_pb2.SamplingParams) -> SamplingParams:
    """The engine's sampling settings.

    Raises:
        InvalidArgument: a field the router must resolve is unset. (Ranges were checked by the router, the only caller.)
    """
    for field in _REQUIRED:
        if not sampling.HasField(field):  # type: ignore[arg-type]
            raise InvalidArgument(f"sampling.{field}", "must be set between services")
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )
