"""What the router counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from baton.v1 import inference_pb2, ledger_pb2

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

REQUESTS = Counter("baton_requests_total", "Requests by method and outcome", ["method", "outcome"])
IN_FLIGHT = Gauge("baton_requests_in_flight", "Requests being served")
TTFT_SECONDS = Histogram("baton_time_to_first_token_seconds", "Receipt to first token", buckets=_SECONDS)
REQUEST_SECONDS = Histogram("baton_request_seconds", "Receipt to last message", buckets=_SECONDS)
PROMPT_TOKENS = Counter("baton_prompt_tokens_total", "Prompt tokens of finished requests")
COMPLETION_TOKENS = Counter("baton_completion_tokens_total", "Generated tokens of finished requests")
CACHE = Counter("baton_response_cache_total", "Finished requests by cache status", ["status"])
CACHE_FAILURES = Counter("baton_response_cache_failures_total", "Cache calls that failed, by what failed", ["what"])
MIGRATIONS = Counter("baton_migrations_total", "Times a request moved to another decode worker")
LEDGER_SECONDS = Counter("baton_ledger_seconds_total", "Time of finished requests by hop and kind", ["hop", "kind"])
RESIDUAL_SECONDS = Histogram(
    "baton_ledger_residual_seconds",
    "Time of a finished request that no ledger entry accounts for",
    buckets=(0.00001, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.1, 1),
)


def record(summary: inference_pb2.Summary) -> None:
    """Count a finished request."""
    PROMPT_TOKENS.inc(summary.usage.prompt_tokens)
    COMPLETION_TOKENS.inc(summary.usage.completion_tokens)
    CACHE.labels(_word(inference_pb2.CacheStatus.Name(summary.cache_status), 2)).inc()
    ledger = summary.ledger
    REQUEST_SECONDS.observe(ledger.total.total.ToNanoseconds() / 1e9)
    if ledger.HasField("first_token"):
        TTFT_SECONDS.observe(ledger.first_token.total.ToNanoseconds() / 1e9)
    for entry in ledger.total.entries:
        labels = _word(ledger_pb2.Hop.Name(entry.hop), 1), _word(ledger_pb2.Kind.Name(entry.kind), 1)
        LEDGER_SECONDS.labels(*labels).inc(max(0.0, entry.duration.ToNanoseconds() / 1e9))
    RESIDUAL_SECONDS.observe(abs(ledger.total.residual.ToNanoseconds()) / 1e9)


def _word(name: str, prefix_words: int) -> str:
    """ "CACHE_STATUS_HIT" as "hit"."""
    return name.split("_", prefix_words)[-1].lower()
