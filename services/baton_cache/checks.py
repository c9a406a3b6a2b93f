"""What is refused, and what is not cached. Pure."""

from __future__ import annotations

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import InvalidArgument
from baton.v1 import sampling_pb2
from baton_cache.key import has_unknown_fields

_NS_PER_MS = 1_000_000
_SPREAD = 0.1


def check_key(
    request: response_cache_pb2.LookupRequest | response_cache_pb2.FillRequest | response_cache_pb2.JoinStart,
) -> None:
    """A key says what it must.

    Raises:
        InvalidArgument: naming the field that is missing.
    """
    if not request.HasField("key"):
        raise InvalidArgument("key", "must be set")
    key = request.key
    if not key.model_fingerprint:
        raise InvalidArgument("key.model_fingerprint", "must not be empty")
    if not key.token_ids:
        raise InvalidArgument("key.token_ids", "must not be empty")
    if not key.sampling.HasField("temperature"):
        raise InvalidArgument("key.sampling.temperature", "must be set")


def uncacheable(key: response_cache_pb2.CacheKey) -> InvalidArgument | None:
    """Why answers to this key cannot be stored; None: they can."""
    if key.sampling.temperature != 0 and not key.sampling.HasField("seed"):
        return InvalidArgument(
            "key.sampling.seed", "must be set where temperature is above 0: no two answers are alike"
        )
    if has_unknown_fields(key):
        return InvalidArgument("key", "has fields that this cache does not know: it is older than its caller")
    return None


def check_answer(answer: response_cache_pb2.CachedAnswer) -> None:
    """An answer is complete.

    Raises:
        InvalidArgument: it has not ended.
    """
    if answer.finish_reason == sampling_pb2.FINISH_REASON_UNSPECIFIED:
        raise InvalidArgument("answer.finish_reason", "must be set: only complete answers are stored")


def ttl_ms(
    request: response_cache_pb2.FillRequest | response_cache_pb2.JoinDone,
    default_seconds: float,
    most_seconds: float,
    chance: float,
) -> int:
    """Milliseconds an answer may be served, 1 to `most_seconds`. Spread, so that what came together does not expire so.

    Args:
        request: what says how long; a TTL it sets is shortened by up to a tenth, never prolonged.
        default_seconds: where it does not: up to a tenth more or less of this.
        most_seconds: in any case.
        chance: 0 to 1, drawn evenly.

    Raises:
        InvalidArgument: a TTL that is not above 0.
    """
    if request.HasField("ttl"):
        asked = request.ttl.seconds * 1_000_000_000 + request.ttl.nanos
        if asked <= 0:
            raise InvalidArgument("ttl", "must be above 0")
        longest = shortest = min(asked / _NS_PER_MS, most_seconds * 1000)
    else:
        shortest = min(default_seconds, most_seconds) * 1000
        longest = min(default_seconds * (1 + _SPREAD), most_seconds) * 1000
    shortest *= 1 - _SPREAD
    return max(1, int(shortest + (longest - shortest) * chance))
