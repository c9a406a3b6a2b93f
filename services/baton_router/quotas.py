"""Each tenant's own limits: requests and tokens per minute, and requests at once. What exceeds one is refused at
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from baton.rpc.errors import QuotaExceeded
from baton_router.tenants import TenantPolicy, Tenants
from baton_router.token_bucket import TokenBucket

_REMEMBERED: Final = 1024
"""Tenants whose buckets are kept though they are full."""
_PLACE_SECONDS: Final = 1.0
"""When to ask again for a place that another request of the tenant has: nobody knows."""


@dataclass(slots=True)
class _State:
    """What a tenant uses."""

    in_flight: int = 0
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None

    def idle(self, now: float) -> bool:
        """Whether it may be forgotten."""
        return not self.in_flight and all(bucket is None or bucket.full(now) for bucket in (self.requests, self.tokens))


class Quotas:
    """See above.

    Args:
        tenants: what they may have.
        places: requests this router serves at once.
        now: seconds, monotonic.
    """

    def __init__(self, tenants: Tenants, places: int, now: Callable[[], float]) -> None:
        self._tenants = tenants
        self._places = places
        self._now = now
        self._states: dict[str, _State] = {}

    def policy(self, tenant: str) -> TenantPolicy:
        """What a tenant may have."""
        return self._tenants.policy(tenant)

    @contextmanager
    def entered(self, tenant: str) -> Iterator[Meter]:
        """A request of a tenant, from its receipt to its end.

        Raises:
            QuotaExceeded: it is one too many.
        """
        policy, state = self._tenants.policy(tenant), self._state(tenant)
        share = places_of(policy, self._places)
        for name, limit in (("max_concurrency", policy.max_concurrency), ("max_share", share)):
            if limit is not None and state.in_flight >= limit:
                raise QuotaExceeded(tenant, name, f"{limit} requests at once", _PLACE_SECONDS)
        if state.requests is not None:
            if wait := state.requests.wait(1, self._now()):
                raise QuotaExceeded(tenant, "requests_per_minute", f"{policy.requests_per_minute:g}", wait)
            state.requests.draw(1, self._now())
        state.in_flight += 1
        try:
            yield Meter(tenant, policy, state.tokens, self._now)
        finally:
            state.in_flight -= 1

    def _state(self, tenant: str) -> _State:
        """A tenant's state, with the buckets its policy asks for now."""
        now = self._now()
        if tenant not in self._states and len(self._states) >= _REMEMBERED:
            self._states = {name: state for name, state in self._states.items() if not state.idle(now)}
        state = self._states.setdefault(tenant, _State())
        policy = self._tenants.policy(tenant)
        state.requests = _bucket(state.requests, policy.requests_per_minute, now)
        state.tokens = _bucket(state.tokens, policy.tokens_per_minute, now)
        return state


class Meter:
    """Charges one request's tokens to its tenant."""

    def __init__(self, tenant: str, policy: TenantPolicy, bucket: TokenBucket | None, now: Callable[[], float]) -> None:
        self._tenant = tenant
        self._policy = policy
        self._bucket = bucket
        self._now = now

    def prompt(self, tokens: int) -> None:
        """Its prompt is so long.

        Raises:
            QuotaExceeded: the tenant has used its tokens up.
        """
        if self._bucket is not None:
            if wait := self._bucket.wait(tokens, self._now()):
                limit = f"{self._policy.tokens_per_minute:g}"
                raise QuotaExceeded(self._tenant, "tokens_per_minute", limit, wait)
            self._bucket.draw(tokens, self._now())

    def answer(self, tokens: int) -> None:
        """Its answer got so long: known only now, so the tenant may owe some."""
        if self._bucket is not None:
            self._bucket.draw(tokens, self._now())


def places_of(policy: TenantPolicy, places: int) -> int:
    """How many of so many places a tenant may have: one at least, and not all of them unless its share is all."""
    return places if policy.max_share >= 1 else max(1, int(policy.max_share * places))


def _bucket(bucket: TokenBucket | None, per_minute: float | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.change(per_minute, now)
    return bucket
