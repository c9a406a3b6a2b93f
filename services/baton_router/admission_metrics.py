"""What admission counts. By class of tenant, never by tenant: there may be any number of those."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

from baton_router.ticket import Shed

QUEUE_REQUESTS = Gauge("baton_admission_queue_requests", "Requests that wait in the router for a place at the workers")
QUEUE_TOKENS = Gauge("baton_admission_queue_tokens", "Tokens, of prompts and expected answers, that wait in the router")
PLACES = Gauge("baton_admission_places", "Requests that this router has at the workers")
WAIT_SECONDS = Histogram(
    "baton_admission_wait_seconds",
    "Time in the router's queue of requests that got a place, by priority: low below 0, high above",
    ["priority"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30),
)
REFUSED = Counter(
    "baton_admission_refused_total", "Requests refused before anything was started", ["reason", "tenant_class"]
)
QUOTAS = ("max_concurrency", "max_share", "requests_per_minute", "tokens_per_minute")
_REASONS = (*(shed.value for shed in Shed), *QUOTAS, "max_in_flight")

for _priority in ("low", "normal", "high"):
    WAIT_SECONDS.labels(_priority)


def prepare(classes: Iterable[str]) -> None:
    """A rate needs a reading before the first event."""
    for tenant_class in classes:
        for reason in _REASONS:
            REFUSED.labels(reason, tenant_class)


def refused(reason: str, tenant_class: str) -> None:
    """Count a refusal."""
    REFUSED.labels(reason, tenant_class).inc()


def priority_class(priority: int) -> str:
    """A priority in a word."""
    return "low" if priority < 0 else "high" if priority else "normal"
