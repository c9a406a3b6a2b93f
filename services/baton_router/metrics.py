"""What the router counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

from baton.v1 import inference_pb2, ledger_pb2
from baton_router.arrivals import Arrivals
from baton_router.outcome import OK, outcome_of, outcomes

_GENERATIONS = ("Generate", "StreamGenerate", "Chat", "StreamChat")
_OTHERS = ("Tokenize", "Detokenize", "ListModels", "GetModel")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

REQUESTS = Counter("baton_requests_total", "Calls of the public service by method and outcome", ["method", "outcome"])
IN_FLIGHT = Gauge("baton_requests_in_flight", "Requests being served")
# Names of OpenTelemetry's conventions for generative AI, where they have one, and the attributes these want. A model
# that is not served is refused, so there is one name of a model; a request that was not understood has none.
PROVIDER = "baton"
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_response_model")
TTFT_SECONDS = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Receipt to first token of finished requests, by cache status: a hit's is the cache's",
    [*_GEN_AI, "cache"],
    buckets=_SECONDS,
)
REQUEST_SECONDS = Histogram(
    "gen_ai_server_request_duration_seconds",
    "Receipt to end of all requests; error_type is the outcome of those that did not end well",
    [*_GEN_AI, "error_type"],
    buckets=_SECONDS,
)
TPOT_SECONDS = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Time per token after the first, of finished requests, as workers sent them; cache hits have none",
    _GEN_AI,
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
INTER_TOKEN_SECONDS = Histogram(
    "baton_inter_token_seconds",
    "Gap between two messages with tokens of one answer, as workers sent them",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
PROMPT_TOKENS = Counter("baton_prompt_tokens_total", "Prompt tokens of understood requests")
CACHED_PROMPT_TOKENS = Counter(
    "baton_cached_prompt_tokens_total", "Prompt tokens that were in a worker's prefix cache and not computed"
)
COMPLETION_TOKENS = Counter(
    "baton_completion_tokens_total",
    "Tokens generated for finished requests: not those replayed from the cache, nor those a client resumed from",
)
CACHE = Counter("baton_response_cache_total", "Finished requests by cache status", ["status"])
CACHE_FAILURES = Counter("baton_response_cache_failures_total", "Cache calls that failed, by what failed", ["what"])
CACHE_REPLICAS = Gauge("baton_response_cache_replicas", "Replicas of the cache service in this router's view")
CACHE_REPLICAS_LEFT_ALONE = Gauge(
    "baton_response_cache_replicas_left_alone", "Replicas of the cache service that do not answer and are left alone"
)
FLIGHTS = Gauge("baton_response_cache_flights", "Generations that equal requests may share, under way")
MIGRATIONS = Counter("baton_migrations_total", "Times a request moved to another decode worker")
RETRIES_REFUSED = Counter(
    "baton_retries_refused_total", "Requests that were not tried elsewhere because the retry budget was spent"
)
LEDGER_SECONDS = Histogram(
    "baton_ledger_seconds",
    "Time of a request in one entry of its ledger; an entry below zero counts as 0 and is told by "
    "baton_ledger_negative_remainders_total",
    ["hop", "kind"],
    buckets=_SECONDS,
)
# A metric of its own: a sum over baton_ledger_seconds must not count the time before the first token twice.
FIRST_TOKEN_SECONDS = Histogram(
    "baton_ledger_first_token_seconds",
    "Time of a finished request in one entry of its ledger up to the first token, by cache status; over hop and "
    "kind they sum to gen_ai_server_time_to_first_token_seconds. An entry below zero counts as 0",
    ["hop", "kind", "cache"],
    buckets=_SECONDS,
)
HIDDEN_TRANSFER_SECONDS = Histogram(
    "baton_ledger_hidden_transfer_seconds", "KV transfer that computation hid, beside the ledger", buckets=_SECONDS
)
RESIDUAL_SECONDS = Histogram(
    "baton_ledger_residual_seconds",
    "Time of a request that no ledger entry accounts for",
    buckets=(0.00001, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.1, 1),
)

# A rate needs a reading before the first event: without these the first of a kind would not show.
for _method in (*_GENERATIONS, *_OTHERS):
    for _outcome in outcomes():
        REQUESTS.labels(_method, _outcome)
for _status in ("bypass", "miss", "hit", "coalesced", "semantic"):
    CACHE.labels(_status)
for _what in ("lookup", "join", "follow", "fill", "fill_dropped"):
    CACHE_FAILURES.labels(_what)


@contextmanager
def counting(method: str) -> Iterator[None]:
    """Count a call that generates nothing, by the way the block is left."""
    outcome = OK
    try:
        yield
    except BaseException as error:
        outcome = outcome_of(error)
        raise
    finally:
        REQUESTS.labels(method, outcome).inc()


def operation(method: str) -> str:
    """A generating method's name in OpenTelemetry's conventions."""
    return "chat" if method.endswith("Chat") else "text_completion"


def record(method: str, model: str, outcome: str, summary: inference_pb2.Summary, arrivals: Arrivals) -> None:
    """Count a generation that is over.

    Args:
        method: of the public service.
        model: what answered; empty: the request was not understood.
        outcome: how it ended.
        summary: what is known of it.
        arrivals: what was generated for it.
    """
    REQUESTS.labels(method, outcome).inc()
    gen_ai = operation(method), PROVIDER, model, model
    PROMPT_TOKENS.inc(summary.usage.prompt_tokens)
    CACHED_PROMPT_TOKENS.inc(summary.usage.cached_prompt_tokens)
    ledger = summary.ledger
    REQUEST_SECONDS.labels(*gen_ai, "" if outcome == OK else outcome).observe(ledger.total.total.ToNanoseconds() / 1e9)
    if outcome == OK:
        cache = word(inference_pb2.CacheStatus.Name(summary.cache_status), 2)
        CACHE.labels(cache).inc()
        COMPLETION_TOKENS.inc(arrivals.tokens)
        if ledger.HasField("first_token"):
            TTFT_SECONDS.labels(*gen_ai, cache).observe(ledger.first_token.total.ToNanoseconds() / 1e9)
            for hop, kind, seconds in entries(ledger.first_token):
                FIRST_TOKEN_SECONDS.labels(hop, kind, cache).observe(max(0.0, seconds))
        per_token = arrivals.seconds_per_token()
        if per_token is not None:
            TPOT_SECONDS.labels(*gen_ai).observe(per_token)
    for hop, kind, seconds in entries(ledger.total):
        # A histogram's sum must not shrink. Where this clamps, the entries' sums exceed those of the totals.
        LEDGER_SECONDS.labels(hop, kind).observe(max(0.0, seconds))
    HIDDEN_TRANSFER_SECONDS.observe(ledger.total.hidden_transfer.ToNanoseconds() / 1e9)
    RESIDUAL_SECONDS.observe(abs(ledger.total.residual.ToNanoseconds()) / 1e9)


def entries(partition: ledger_pb2.Partition) -> Iterator[tuple[str, str, float]]:
    """Hop and kind of each entry in a word, and its seconds."""
    for entry in partition.entries:
        hop, kind = word(ledger_pb2.Hop.Name(entry.hop), 1), word(ledger_pb2.Kind.Name(entry.kind), 1)
        yield hop, kind, entry.duration.ToNanoseconds() / 1e9


def word(name: str, prefix_words: int) -> str:
    """ "CACHE_STATUS_HIT" as "hit"."""
    return name.split("_", prefix_words)[-1].lower()
