"""What comes back: chunks of a streamed answer, and whole answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.client.ledger import Ledger, from_proto
from baton.v1 import inference_pb2, sampling_pb2


class FinishReason(Enum):
    """Why an answer ended."""

    UNKNOWN = sampling_pb2.FINISH_REASON_UNSPECIFIED
    STOP = sampling_pb2.FINISH_REASON_STOP
    LENGTH = sampling_pb2.FINISH_REASON_LENGTH
    STOP_STRING = sampling_pb2.FINISH_REASON_STOP_STRING
    TOOL_CALLS = sampling_pb2.FINISH_REASON_TOOL_CALLS

    @classmethod
    def _missing_(cls, value: object) -> FinishReason:
        return cls.UNKNOWN


class CacheStatus(Enum):
    """What the response cache did."""

    UNKNOWN = inference_pb2.CACHE_STATUS_UNSPECIFIED
    BYPASS = inference_pb2.CACHE_STATUS_BYPASS
    MISS = inference_pb2.CACHE_STATUS_MISS
    HIT = inference_pb2.CACHE_STATUS_HIT
    COALESCED = inference_pb2.CACHE_STATUS_COALESCED
    SEMANTIC = inference_pb2.CACHE_STATUS_SEMANTIC

    @classmethod
    def _missing_(cls, value: object) -> CacheStatus:
        return cls.UNKNOWN


class Placement(Enum):
    """The tier that computed the prompt."""

    NONE = inference_pb2.PLACEMENT_UNSPECIFIED
    LOCAL = inference_pb2.PLACEMENT_LOCAL
    REMOTE = inference_pb2.PLACEMENT_REMOTE

    @classmethod
    def _missing_(cls, value: object) -> Placement:
        return cls.NONE


class Transport(Enum):
    """How the KV cache travelled between the tiers."""

    NONE = inference_pb2.TRANSPORT_UNSPECIFIED
    GRPC = inference_pb2.TRANSPORT_GRPC
    SHM = inference_pb2.TRANSPORT_SHM
    NIXL = inference_pb2.TRANSPORT_NIXL

    @classmethod
    def _missing_(cls, value: object) -> Transport:
        return cls.NONE


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens whose KV came from a prefix cache."""
    completion_tokens: int
    speculated_tokens: int


@dataclass(frozen=True, slots=True)
class Start:
    """The server accepted a streamed request."""

    request_id: str
    model: str
    seed: int
    """The seed used: send it again for the same tokens, and to resume."""
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of generated tokens with the text they complete."""

    index: int
    """Position of the first token in the answer."""
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    seed: int
    finish_reason: FinishReason
    usage: Usage
    cache: CacheStatus
    placement: Placement
    transport: Transport
    migrations: int
    """Times the request moved to another decode replica."""
    ledger: Ledger
    cache_entry: str = ""
    """Of an answer from the response cache: the entry, as `baton cache get` takes it."""
    cache_similarity: float | None = None
    """Of the answer of a similar question: cosine similarity of the two."""
    resumes: int = 0
    """Times the client went on at another router."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model."""

    name: str
    max_context: int
    """Tokens of prompt plus answer at most."""
    vocab_size: int
    chat: bool
    """Whether it has a chat template."""
    fingerprint: str
    dtype: str
    """Element type of the KV cache."""
    ready: bool
    """Whether at least one decode worker serves it now."""


def answer(
    start: Start, text: str, token_ids: tuple[int, ...], summary: inference_pb2.Summary, resumes: int = 0
) -> Answer:
    """A whole answer from its parts."""
    return Answer(
        request_id=start.request_id,
        model=start.model,
        text=text,
        token_ids=token_ids,
        seed=start.seed,
        finish_reason=FinishReason(summary.finish_reason),
        usage=Usage(
            prompt_tokens=summary.usage.prompt_tokens,
            cached_prompt_tokens=summary.usage.cached_prompt_tokens,
            completion_tokens=summary.usage.completion_tokens,
            speculated_tokens=summary.usage.speculated_tokens,
        ),
        cache=CacheStatus(summary.cache_status),
        placement=Placement(summary.prefill_placement),
        transport=Transport(summary.transport),
        migrations=summary.migrations,
        ledger=from_proto(summary.ledger),
        cache_entry=summary.cache_entry,
        cache_similarity=summary.cache_similarity if summary.HasField("cache_similarity") else None,
        resumes=resumes,
    )


def from_generate(response: inference_pb2.GenerateResponse) -> Answer:
    """The plain form of a Generate response."""
    start = Start(response.request_id, response.model, response.seed, response.summary.usage.prompt_tokens)
    return answer(start, response.text, tuple(response.token_ids), response.summary)


def from_chat(response: inference_pb2.ChatResponse) -> Answer:
    """The plain form of a Chat response."""
    start = Start(response.request_id, response.model, response.seed, response.summary.usage.prompt_tokens)
    text = "".join(part.text for part in response.message.content)
    return answer(start, text, tuple(response.token_ids), response.summary)


def from_model(model: inference_pb2.Model) -> ModelInfo:
    """The plain form of a model's description."""
    return ModelInfo(
        name=model.name,
        max_context=model.max_context,
        vocab_size=model.vocab_size,
        chat=model.chat,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        ready=model.ready,
    )
