"""What goes out: prompts, messages and options, and their protobuf form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypedDict, TypeVar, cast

from baton.client.answer import Start
from baton.rpc.request_id import HEADER, RULE, usable
from baton.v1 import chat_pb2, inference_pb2, sampling_pb2

Prompt = str | Sequence[int]
"""Text, or token ids of the model's vocabulary."""


StreamRequest = inference_pb2.StreamGenerateRequest | inference_pb2.StreamChatRequest
StreamRequestT = TypeVar("StreamRequestT", bound=StreamRequest)


class Role(Enum):
    """Who speaks in a conversation."""

    SYSTEM = chat_pb2.ROLE_SYSTEM
    USER = chat_pb2.ROLE_USER
    ASSISTANT = chat_pb2.ROLE_ASSISTANT


class CacheMode(Enum):
    """How the response cache may be used."""

    USE = inference_pb2.CACHE_MODE_USE
    BYPASS = inference_pb2.CACHE_MODE_BYPASS
    REFRESH = inference_pb2.CACHE_MODE_REFRESH
    ONLY = inference_pb2.CACHE_MODE_ONLY


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    text: str


class Options(TypedDict, total=False):
    """Options of one request; an absent one leaves the choice to the server. Ranges are in protos/baton/v1.

    max_tokens and the other sampling fields mean what SamplingParams says of them.
    """

    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop: bool
    cache: CacheMode
    cache_ttl: float
    """Seconds a new entry may be served. Absent: the server's choice."""
    semantic: bool
    """Allow the answer of a similar question."""
    original_pace: bool
    """Stream a stored answer as slowly as it was generated."""
    cache_salt: str
    """Share caches with requests of the same salt only."""
    prefix_cache: bool
    """Use what earlier requests that began alike computed. Absent: true."""
    priority: int
    resume_from: Sequence[int]
    """Of a stream: tokens of the answer that are there already; the first chunk comes after them. Needs the seed."""
    request_id: str
    """Id of the request in logs and traces, 1 to 128 visible ASCII characters."""
    timeout: float | None
    """Deadline in seconds from now. Absent: the client's. None: none."""


_SCALARS: Final = (
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
    "skip_special_tokens",
    "include_stop",
)

_KNOWN: Final = frozenset(Options.__annotations__)


def sampling(options: Options) -> sampling_pb2.SamplingParams:
    """The sampling fields that are set.

    Raises:
        TypeError: an option nobody knows.
        ValueError: a value its field cannot hold, for example a negative max_tokens.
    """
    unknown = options.keys() - _KNOWN
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}; there are {', '.join(sorted(_KNOWN))}")
    values = cast("dict[str, object]", options)
    params = sampling_pb2.SamplingParams()
    for name in _SCALARS:
        if values.get(name) is not None:
            try:
                setattr(params, name, values[name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
    stop = options.get("stop", ())
    params.stop.extend([stop] if isinstance(stop, str) else stop)  # a text is a sequence too: of its letters
    params.stop_token_ids.extend(options.get("stop_token_ids", ()))
    params.logit_bias.update(options.get("logit_bias", {}))
    return params


def generate_request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    """A Generate request."""
    request = inference_pb2.GenerateRequest(model=options.get("model", ""), sampling=sampling(options))
    _set_prompt(request, prompt)
    _set_common(request, options)
    return request


def stream_generate_request(prompt: Prompt, options: Options) -> inference_pb2.StreamGenerateRequest:
    """A StreamGenerate request."""
    request = inference_pb2.StreamGenerateRequest(model=options.get("model", ""), sampling=sampling(options))
    _set_prompt(request, prompt)
    _set_common(request, options)
    return request


def chat_request(messages: Sequence[Message], options: Options) -> inference_pb2.ChatRequest:
    """A Chat request."""
    request = inference_pb2.ChatRequest(
        model=options.get("model", ""), sampling=sampling(options), messages=_messages(messages)
    )
    _set_common(request, options)
    return request


def stream_chat_request(messages: Sequence[Message], options: Options) -> inference_pb2.StreamChatRequest:
    """A StreamChat request."""
    request = inference_pb2.StreamChatRequest(
        model=options.get("model", ""), sampling=sampling(options), messages=_messages(messages)
    )
    _set_common(request, options)
    return request


def resumed(message: StreamRequestT, start: Start, token_ids: Sequence[int]) -> StreamRequestT:
    """The request that goes on with an answer elsewhere: same seed, so the same tokens, from the next one on."""
    again = copy.deepcopy(message)
    again.model = start.model
    again.sampling.seed = start.seed
    del again.resume_from.ids[:]
    again.resume_from.ids.extend(token_ids)
    return again


def metadata(options: Options, always: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """gRPC metadata of a call: the client's own, and the request id."""
    request_id = options.get("request_id")
    if not request_id:
        return tuple(always)
    if not usable(request_id):
        raise ValueError(f"request_id: must be {RULE}")
    return (*always, (HEADER, request_id))


def same_id(metadata: Sequence[tuple[str, str]], request_id: str) -> tuple[tuple[str, str], ...]:
    """Metadata under which a request goes on elsewhere: the id that the first router gave it."""
    return (*(pair for pair in metadata if pair[0] != HEADER), (HEADER, request_id))


def timeout(options: Options, default: float | None) -> float | None:
    """Deadline of a call, seconds from now."""
    return options.get("timeout", default)


def _messages(messages: Sequence[Message]) -> list[chat_pb2.ChatMessage]:
    if not all(isinstance(message, Message) for message in messages):
        raise TypeError("messages must be a list of Message(Role, text)")
    return [
        chat_pb2.ChatMessage(role=message.role.value, content=[chat_pb2.ContentPart(text=message.text)])
        for message in messages
    ]


def _set_prompt(request: inference_pb2.GenerateRequest | inference_pb2.StreamGenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)


def _set_common(
    request: (
        inference_pb2.GenerateRequest
        | inference_pb2.StreamGenerateRequest
        | inference_pb2.ChatRequest
        | inference_pb2.StreamChatRequest
    ),
    options: Options,
) -> None:
    if "cache" in options:
        request.cache_control.mode = options["cache"].value
    if "cache_ttl" in options:
        request.cache_control.ttl.FromNanoseconds(round(options["cache_ttl"] * 1e9))
    if "semantic" in options:
        request.cache_control.semantic = options["semantic"]
    if "original_pace" in options:
        request.cache_control.original_pace = options["original_pace"]
    if "cache_salt" in options:
        request.cache_control.cache_salt = options["cache_salt"]
    if "prefix_cache" in options:
        request.cache_control.prefix_cache = options["prefix_cache"]
    if "priority" in options:
        request.priority = options["priority"]
    if "resume_from" in options:
        if not isinstance(request, StreamRequest):
            raise ValueError("resume_from: only a stream goes on from where it was")
        request.resume_from.ids.extend(options["resume_from"])
