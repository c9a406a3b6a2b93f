"""What the semantic cache counts. No text, no tenant."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from baton_cache.semantic.guard import Rule

_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SIMILARITIES: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
OUTCOMES: Final = ("hit", "shadow_hit", "nothing_near", "refused", "gone", "not_embedded", "store_failed", "too_long")

LOOKUPS = Counter("baton_cache_semantic_lookups_total", "Searches for a similar question, by outcome", ["outcome"])
REFUSALS = Counter(
    "baton_cache_semantic_refusals_total", "Near questions that ask something else, by the rule that says so", ["rule"]
)
SIMILARITY = Histogram(
    "baton_cache_semantic_similarity", "Cosine of the nearest stored question", buckets=_SIMILARITIES
)
EMBED_SECONDS = Histogram(
    "baton_cache_semantic_embed_seconds", "Time to embed a question, its wait included", buckets=_SECONDS
)
EMBED_FAILURES = Counter("baton_cache_semantic_embed_failures_total", "Questions not embedded, and why", ["how"])
INDEXED = Gauge("baton_cache_semantic_questions", "Questions in this replica's own index; 0 where Redis holds them")
EVICTIONS = Counter("baton_cache_semantic_evictions_total", "Questions dropped for room from this replica's own index")
SHADOW_AGREEMENT = Histogram(
    "baton_cache_semantic_shadow_agreement",
    "How alike the answer that would have been served and the generated one are: 1 is equal",
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0),
)
SHADOW_EQUAL = Counter("baton_cache_semantic_shadow_answers_total", "Shadow hits judged by their answers", ["answers"])
for _outcome in OUTCOMES:
    LOOKUPS.labels(_outcome)  # a zero is a figure, no data is a question
for _rule in Rule:
    REFUSALS.labels(_rule.value)
for _how in ("busy", "timeout", "failed"):
    EMBED_FAILURES.labels(_how)
for _answers in ("equal", "different"):
    SHADOW_EQUAL.labels(_answers)
