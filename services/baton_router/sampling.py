"""Sampling parameters: checked, and every field filled in. Pure."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

from baton.rpc.errors import InvalidArgument
from baton.text.model import SamplingDefaults
from baton.v1 import sampling_pb2

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_BIAS = 100.0

_NOT_SERVED = ("logprobs", "prompt_logprobs")


def check_sampling(params: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    """Everything that can be checked without the prompt.

    Raises:
        InvalidArgument: naming the field, below `sampling`.
    """
    for field in _NOT_SERVED:
        if params.HasField(field):  # type: ignore[arg-type]
            raise InvalidArgument(f"sampling.{field}", "is not served yet")
    if params.HasField("n") and params.n != 1:
        raise InvalidArgument("sampling.n", "must be 1; other values are not served yet")
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise InvalidArgument("sampling.max_tokens", "must be at least 1")
    _check_number(params, "temperature", 0, 2)
    _check_number(params, "top_p", 0, 1, open_below=True)
    _check_number(params, "min_p", 0, 1)
    _check_number(params, "repetition_penalty", 0, 10, open_below=True)
    _check_number(params, "presence_penalty", -2, 2)
    _check_number(params, "frequency_penalty", -2, 2)
    _check_stops(params, vocab_size)
    _check_biases(params, vocab_size)


def resolve_sampling(
    params: sampling_pb2.SamplingParams,
    defaults: SamplingDefaults,
    vocab_size: int,
    room: int,
    draw: Callable[[], int] = lambda: secrets.randbits(64),
) -> sampling_pb2.SamplingParams:
    """The same with every field set: the request's value, else the model's default, else what switches it off.

    Args:
        params: checked by `check_sampling`.
        defaults: of the model.
        vocab_size: number of token ids; a top_k of that many or more is off.
        room: tokens that fit behind the prompt, at least 1.
        draw: makes a seed where there is none.

    Raises:
        InvalidArgument: max_tokens or min_tokens does not fit.
    """
    max_tokens = params.max_tokens if params.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, room)
    if max_tokens > room:
        raise InvalidArgument("sampling.max_tokens", f"must be at most {room}: what the prompt leaves of the context")
    if params.min_tokens > max_tokens:
        raise InvalidArgument("sampling.min_tokens", f"must be at most max_tokens, {max_tokens}")
    top_k = params.top_k if params.HasField("top_k") else defaults.top_k
    return sampling_pb2.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature if params.HasField("temperature") else defaults.temperature,
        top_p=params.top_p if params.HasField("top_p") else defaults.top_p,
        top_k=top_k if top_k < vocab_size else 0,
        min_p=params.min_p if params.HasField("min_p") else defaults.min_p,
        repetition_penalty=(
            params.repetition_penalty if params.HasField("repetition_penalty") else defaults.repetition_penalty
        ),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed if params.HasField("seed") else draw(),
        n=1,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
        include_stop=params.include_stop,
    )


def default_sampling(defaults: SamplingDefaults) -> sampling_pb2.SamplingParams:
    """What GetModel shows: the values unset fields get, where they do not depend on the prompt."""
    shown = resolve_sampling(sampling_pb2.SamplingParams(), defaults, 2**32, DEFAULT_MAX_TOKENS, lambda: 0)
    shown.ClearField("seed")
    return shown


def _check_number(
    params: sampling_pb2.SamplingParams, field: str, low: float, high: float, *, open_below: bool = False
) -> None:
    if not params.HasField(field):  # type: ignore[arg-type]
        return
    value: float = getattr(params, field)
    if not (math.isfinite(value) and (low < value if open_below else low <= value) and value <= high):
        raise InvalidArgument(f"sampling.{field}", f"must be in {'(' if open_below else '['}{low}, {high}]")


def _check_stops(params: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    if len(params.stop) > MAX_STOPS:
        raise InvalidArgument("sampling.stop", f"must have at most {MAX_STOPS} texts")
    for i, stop in enumerate(params.stop):
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidArgument(f"sampling.stop[{i}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidArgument("sampling.stop_token_ids", f"must have at most {MAX_STOP_TOKENS} ids")
    for i, token_id in enumerate(params.stop_token_ids):
        if token_id >= vocab_size:
            raise InvalidArgument(f"sampling.stop_token_ids[{i}]", f"must be below the vocabulary size, {vocab_size}")


def _check_biases(params: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    if len(params.logit_bias) > MAX_BIASES:
        raise InvalidArgument("sampling.logit_bias", f"must have at most {MAX_BIASES} entries")
    for token_id, bias in params.logit_bias.items():
        path = f"sampling.logit_bias[{token_id}]"
        if token_id >= vocab_size:
            raise InvalidArgument(path, f"its token id must be below the vocabulary size, {vocab_size}")
        if not (math.isfinite(bias) and abs(bias) <= MAX_BIAS):
            raise InvalidArgument(path, f"must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")
