"""What the cache counts."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

LOOKUPS = Counter("baton_cache_lookups_total", "Lookups: hit, or why not", ["outcome"])
FILLS = Counter("baton_cache_fills_total", "Fills: stored, or why not", ["outcome"])
HITS = Counter("baton_cache_hits_total", "Hits, by where the answer was", ["tier"])
REJECTED = Counter("baton_cache_rejected_total", "Values that were found and not served, and why", ["why"])
READ_BYTES = Counter("baton_cache_read_bytes_total", "Bytes of values read from Redis")
WRITTEN_BYTES = Counter("baton_cache_written_bytes_total", "Bytes of values written to Redis")
ANSWER_BYTES = Counter("baton_cache_answer_bytes_total", "Bytes of answers written to Redis, before compression")
JOINS = Counter("baton_cache_joins_total", "Callers that share a generation, by what they were or became", ["role"])
FLIGHTS = Gauge("baton_cache_flights", "Generations that callers share, under way")
REDIS_SECONDS = Histogram(
    "baton_cache_redis_seconds", "Time of a Redis call, failed ones included", ["operation"], buckets=_SECONDS
)
REDIS_FAILURES = Counter("baton_cache_redis_failures_total", "Redis calls that failed, and how", ["operation", "how"])
for _how in ("no_answer", "refused", "breaker_open", "no_server", "moved"):
    for _operation in ("get", "set", "remove", "ping", "claim", "hold", "release", "listen", "scan", "info"):
        REDIS_FAILURES.labels(_operation, _how)  # a zero is a figure, no data is a question
    for _operation in ("index_add", "index_search", "index_remove", "index_detect"):
        REDIS_FAILURES.labels(_operation, _how)  # a zero is a figure, no data is a question
for _role in ("hit", "leader", "follower", "promoted", "dissolved"):
    JOINS.labels(_role)
for _outcome in ("hit", "similar", "absent", "store_failed", "corrupt"):
    LOOKUPS.labels(_outcome)
for _outcome in ("stored", "too_large", "store_failed"):
    FILLS.labels(_outcome)
BREAKER_OPEN = Gauge("baton_cache_breaker_open", "Redis servers left alone because they do not answer")
BREAKER_OPENINGS = Counter("baton_cache_breaker_openings_total", "Times a Redis server began to be left alone")
POOL_IN_USE = Gauge("baton_cache_redis_connections_in_use", "Connections to Redis with a call on them")
LOCAL_ON = Gauge("baton_cache_local_on", "1 while Redis tells of changes, so that entries are held in memory")
LOCAL_ENTRIES = Gauge("baton_cache_local_entries", "Entries held in memory")
LOCAL_BYTES = Gauge("baton_cache_local_bytes", "Bytes of entries held in memory")
LOCAL_REMOVED = Counter("baton_cache_local_removed_total", "Entries removed from memory, and why", ["why"])
LOCAL_INVALIDATIONS = Counter("baton_cache_local_invalidations_total", "Changes that Redis told of", ["of"])
for _tier in ("local", "redis"):
    HITS.labels(_tier)
for _why in ("corrupt", "other_version", "too_large"):
    REJECTED.labels(_why)
for _why in ("changed", "dropped", "evicted", "expired"):
    LOCAL_REMOVED.labels(_why)
for _of in ("name", "all"):
    LOCAL_INVALIDATIONS.labels(_of)
