"""Requests: what is wrong with them, by field path, and what is left when nothing is. Pure.

Two steps, because tokenizing lies between them: `check` looks at everything that costs nothing, so bad input is refused
before any work; `resolve` needs the prompt's token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import InvalidArgument, ModelNotFound
from baton.text.model import SamplingDefaults
from baton.v1 import chat_pb2, inference_pb2, sampling_pb2
from baton_router.salts import Salts
from baton_router.sampling import check_sampling, resolve_sampling

AnyGenerate = inference_pb2.GenerateRequest | inference_pb2.StreamGenerateRequest
AnyChat = inference_pb2.ChatRequest | inference_pb2.StreamChatRequest
AnyRequest = AnyGenerate | AnyChat

MAX_PRIORITY: Final = 100
MIN_TTL_SECONDS: Final = 1
MAX_TTL_SECONDS: Final = 30 * 24 * 3600
MAX_SALT_BYTES: Final = 256
MAX_NAME_BYTES: Final = 256
_ROLES: Final = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a request."""

    model_name: str
    max_context: int
    """Tokens of prompt plus answer."""
    vocab_size: int
    max_prompt_bytes: int
    max_messages: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One checked message."""

    role: str
    text: str


Prompt = str | list[int] | list[Turn]
"""Text, token ids, or a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A checked, tokenized request with every default filled in.

    Invariants: 1 <= len(prompt_ids) < max_context; len(delivered) < sampling.max_tokens <= max_context -
    len(prompt_ids); every field of `sampling` is set.
    """

    prompt_ids: list[int]
    delivered: list[int]
    """Tokens of the answer the client already has."""
    sampling: sampling_pb2.SamplingParams
    deterministic: bool
    """Greedy, or the client chose the seed: asking again gives the same answer."""
    question: response_cache_pb2.SemanticQuestion | None
    """Allows the answer of a similar one; None: only of the same."""
    cache_mode: inference_pb2.CacheMode.ValueType
    cache_ttl_seconds: float | None
    original_pace: bool
    """A stored answer is streamed as it was generated."""
    tenant: str
    """Whose it is, as authentication says; empty: nobody's in particular."""
    cache_salt: str
    """It shares caches with requests of the same tenant and salt only."""
    prefix_salt: bytes
    """The same for prefix caches, as workers are told it."""
    prefix_cache: bool
    """It may use computed prefixes of others, and leave its own to them."""
    priority: int


def check(request: AnyRequest, limits: Limits) -> Prompt:
    """Everything that can be checked without tokenizing; returns the prompt.

    Raises:
        InvalidArgument: naming the field.
        ModelNotFound: no such model.
    """
    check_model(request.model, "model", limits)
    if request.HasField("constraint"):
        raise InvalidArgument("constraint", "is not served yet")
    if isinstance(request, inference_pb2.ChatRequest | inference_pb2.StreamChatRequest) and request.tools:
        raise InvalidArgument("tools", "is not served yet")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidArgument("priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    _check_cache_control(request.cache_control)
    check_sampling(request.sampling, limits.vocab_size)
    if isinstance(request, inference_pb2.StreamGenerateRequest | inference_pb2.StreamChatRequest):
        _check_resume(request.resume_from.ids, limits)
    if isinstance(request, inference_pb2.ChatRequest | inference_pb2.StreamChatRequest):
        return check_messages(request.messages, "messages", limits)
    return _check_prompt(request, limits)


def resolve(
    request: AnyRequest,
    prompt_ids: list[int],
    limits: Limits,
    defaults: SamplingDefaults,
    salts: Salts,
    question: response_cache_pb2.SemanticQuestion | None = None,
    tenant: str = "",
) -> ResolvedRequest:
    """A checked request, its tokens, its question, and whose it is together.

    Raises:
        InvalidArgument: prompt and answer do not fit into the context, or a resumed answer does not go on.
    """
    check_length(len(prompt_ids), prompt_field(request), limits)
    room = limits.max_context - len(prompt_ids)
    sampling = resolve_sampling(request.sampling, defaults, limits.vocab_size, room)
    chosen_seed = request.sampling.HasField("seed")
    delivered: list[int] = []
    if isinstance(request, inference_pb2.StreamGenerateRequest | inference_pb2.StreamChatRequest):
        delivered = list(request.resume_from.ids)
    if delivered and sampling.temperature > 0 and not chosen_seed:
        raise InvalidArgument("sampling.seed", "must be the first attempt's seed when resume_from is set")
    if len(delivered) > sampling.max_tokens:
        raise InvalidArgument("resume_from.ids", f"must be at most max_tokens, {sampling.max_tokens}, long")
    control = request.cache_control
    return ResolvedRequest(
        prompt_ids=prompt_ids,
        delivered=delivered,
        sampling=sampling,
        deterministic=chosen_seed or sampling.temperature == 0,
        question=question,
        cache_mode=control.mode or inference_pb2.CACHE_MODE_USE,
        cache_ttl_seconds=control.ttl.ToNanoseconds() / 1e9 if control.HasField("ttl") else None,
        original_pace=control.original_pace,
        tenant=tenant,
        cache_salt=control.cache_salt,
        prefix_salt=salts.derive(tenant, control.cache_salt),
        prefix_cache=control.prefix_cache or not control.HasField("prefix_cache"),
        priority=request.priority,
    )


def prompt_field(request: AnyRequest) -> str:
    """Path of the field that holds the prompt."""
    if isinstance(request, inference_pb2.ChatRequest | inference_pb2.StreamChatRequest):
        return "messages"
    return "text" if request.WhichOneof("prompt") == "text" else "token_ids"


def check_model(name: str, field: str, limits: Limits) -> None:
    """A request's model is the one served, or not named.

    Raises:
        InvalidArgument: the name is too long to be one.
        ModelNotFound: another one.
    """
    check_name(name, field)
    if name and name != limits.model_name:
        raise ModelNotFound(field, f"{name!r} is not served here; {limits.model_name!r} is")


def check_name(name: str, field: str) -> None:
    """A name is not so long that an error could not repeat it. Raises InvalidArgument: it is."""
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(field, f"must be at most {MAX_NAME_BYTES} bytes")


def check_length(num_tokens: int, field: str, limits: Limits) -> None:
    """A prompt leaves room for an answer.

    Raises:
        InvalidArgument: it has no tokens, or fills the context.
    """
    if not num_tokens:
        raise InvalidArgument(field, "has no tokens")
    if num_tokens >= limits.max_context:
        raise InvalidArgument(
            field, f"has {num_tokens} tokens; the model's context of {limits.max_context} must leave room for an answer"
        )


def check_bytes(num_bytes: int, field: str, limits: Limits) -> None:
    """A prompt is short enough to be worth tokenizing.

    Args:
        num_bytes: its size as sent. Looking at megabytes of text takes longer than refusing them may.
        field: its path.
        limits: what is taken.

    Raises:
        InvalidArgument: it is not.
    """
    if num_bytes > limits.max_prompt_bytes:
        raise InvalidArgument(field, f"has {num_bytes} bytes; at most {limits.max_prompt_bytes} are taken")


def check_ids(ids: Sequence[int], field: str, limits: Limits) -> None:
    """Token ids are ids of the vocabulary.

    Raises:
        InvalidArgument: naming the first that is not.
    """
    if max(ids, default=0) < limits.vocab_size:
        return
    first = next(i for i, token_id in enumerate(ids) if token_id >= limits.vocab_size)
    raise InvalidArgument(f"{field}[{first}]", f"must be below the vocabulary size, {limits.vocab_size}")


def check_messages(messages: Sequence[chat_pb2.ChatMessage], field: str, limits: Limits) -> list[Turn]:
    """A conversation.

    Raises:
        InvalidArgument: naming the field.
    """
    if not messages:
        raise InvalidArgument(field, "must have at least one message")
    if len(messages) > limits.max_messages:
        raise InvalidArgument(field, f"must have at most {limits.max_messages} messages")
    check_bytes(sum(message.ByteSize() for message in messages), field, limits)
    return [_check_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _check_message(message: chat_pb2.ChatMessage, path: str) -> Turn:
    if message.role == chat_pb2.ROLE_TOOL:
        raise InvalidArgument(f"{path}.role", "ROLE_TOOL is not served yet")
    if message.role not in _ROLES:
        raise InvalidArgument(f"{path}.role", "must be ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT")
    if message.tool_calls:
        raise InvalidArgument(f"{path}.tool_calls", "is not served yet")
    if message.HasField("tool_call_id"):
        raise InvalidArgument(f"{path}.tool_call_id", "is not served yet")
    if not message.content:
        raise InvalidArgument(f"{path}.content", "must have at least one part")
    for i, part in enumerate(message.content):
        if part.WhichOneof("part") is None:
            raise InvalidArgument(f"{path}.content[{i}]", "must be a text")
    return Turn(_ROLES[message.role], "".join(part.text for part in message.content))


def _check_prompt(request: AnyGenerate, limits: Limits) -> str | list[int]:
    match request.WhichOneof("prompt"):
        case "text":
            check_bytes(_text_size(request), "text", limits)
            if not request.text:
                raise InvalidArgument("text", "must not be empty")
            return request.text
        case "token_ids":
            check_length(len(request.token_ids.ids), "token_ids", limits)
            check_ids(request.token_ids.ids, "token_ids.ids", limits)
            return list(request.token_ids.ids)
        case _:
            raise InvalidArgument("prompt", "must be text or token_ids")


def _text_size(request: AnyGenerate) -> int:
    """Bytes of a prompt's text, give or take a few: the request less what else is large in it."""
    rest = request.sampling.ByteSize() + request.cache_control.ByteSize()
    if isinstance(request, inference_pb2.StreamGenerateRequest):
        rest += request.resume_from.ByteSize()
    return request.ByteSize() - rest


def _check_resume(ids: Sequence[int], limits: Limits) -> None:
    if len(ids) >= limits.max_context:
        raise InvalidArgument("resume_from.ids", "is longer than the model's context")
    check_ids(ids, "resume_from.ids", limits)


def _check_cache_control(control: inference_pb2.CacheControl) -> None:
    if control.mode not in inference_pb2.CacheMode.values():
        raise InvalidArgument("cache_control.mode", "is no known mode")
    # Nanoseconds may be negative, and more than a second, in a Duration that nobody checked.
    if control.HasField("ttl") and not MIN_TTL_SECONDS <= control.ttl.ToNanoseconds() / 1e9 <= MAX_TTL_SECONDS:
        raise InvalidArgument("cache_control.ttl", "must be 1 s to 30 days")
    if len(control.cache_salt.encode()) > MAX_SALT_BYTES:
        raise InvalidArgument("cache_control.cache_salt", f"must be at most {MAX_SALT_BYTES} bytes")
