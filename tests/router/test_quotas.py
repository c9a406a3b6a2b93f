"""Tenants' limits: the file, its reload, rates, and requests at once."""

from __future__ import annotations

import os
from contextlib import ExitStack
from copy import copy
from pathlib import Path

import pytest
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.rpc.errors import QuotaExceeded
from baton_router.quotas import Quotas, places_of
from baton_router.tenants import TenantPolicy, Tenants, TenantsFileError
from baton_router.token_bucket import BURST_SECONDS, TokenBucket

FILE = """
[default]
requests_per_minute = 60

[tenants.acme]
class = "gold"
weight = 4.0
max_concurrency = 2
tokens_per_minute = 600
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.toml"
    path.write_text(FILE)
    return path


def a_quotas(path: Path | None, places: int = 100) -> tuple[Quotas, Clock]:
    clock = Clock()
    return Quotas(Tenants(path), places, clock), clock


@settings(max_examples=200, deadline=None)
@given(
    per_minute=st.floats(0.5, 6000),
    asked=st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 50), st.floats(0, 50)), min_size=1, max_size=60),
)
def test_rate_holds(per_minute: float, asked: list[tuple[float, float, float]]) -> None:
    """Whatever was taken before the last request: no more than the rate gives, a burst, and what one may owe."""
    now, taken = 0.0, 0.0
    bucket = TokenBucket(per_minute, now)
    burst = max(1.0, per_minute / 60 * BURST_SECONDS)
    for pause, known, later in asked:
        now += pause
        wait = bucket.wait(known, now)
        if wait == 0:
            assert taken + min(known, burst) <= burst + per_minute / 60 * now + 1e-6
            bucket.draw(known, now)
            bucket.draw(later, now)
            taken += known + later
        else:
            assert copy(bucket).wait(known, now + wait) == pytest.approx(0, abs=1e-6), "it is told when to come again"


def test_file(path: Path) -> None:
    tenants = Tenants(path)
    acme = tenants.policy("acme")
    assert (acme.tenant_class, acme.weight, acme.max_concurrency) == ("gold", 4.0, 2)
    assert acme.requests_per_minute is None, "a table of its own replaces the default one"
    assert tenants.policy("other") == tenants.policy("") == TenantPolicy(requests_per_minute=60)
    assert tenants.classes() == {"gold", "default"}
    nobody = Tenants(None).policy("anybody")
    assert (nobody.max_share, nobody.requests_per_minute, nobody.weight) == (1.0, None, 1.0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tenants.acme]\nwieght = 2", "tenants.acme.wieght"),
        ("[tenants.acme]\nweight = 0", "tenants.acme.weight"),
        ("[default]\nmax_concurrency = -1", "default.max_concurrency"),
        ('[default]\nclass = "Gold!"', "default.class"),
        ("[tenants", "tenants.toml: Expected"),
        ("[other]", "other"),
    ],
)
def test_a_wrong_file_names_the_field(path: Path, text: str, named: str) -> None:
    path.write_text(text)
    with pytest.raises(TenantsFileError, match=named.replace(".", r"\.")):
        Tenants(path)


def test_reload(path: Path) -> None:
    tenants = Tenants(path)
    assert not tenants.reload()
    path.write_text(FILE.replace("weight = 4.0", "weight = 5.5"))
    assert tenants.reload()
    assert tenants.policy("acme").weight == 5.5
    path.write_text("nonsense")
    assert not tenants.reload()
    os.remove(path)
    assert not tenants.reload()
    assert tenants.policy("acme").weight == 5.5, "what cannot be used changes nothing"


def test_requests_at_once(path: Path) -> None:
    quotas, _ = a_quotas(path)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(quotas.entered("acme"))
        with pytest.raises(QuotaExceeded) as caught, quotas.entered("acme"):
            pass
        assert (caught.value.tenant, caught.value.limit) == ("acme", "max_concurrency")
        with quotas.entered("other"):
            pass
    with quotas.entered("acme"):
        pass


def test_one_tenant_cannot_have_all_places(path: Path) -> None:
    """Where there are tenants; and where there are none, nothing is kept free for them."""
    quotas, clock = a_quotas(path, places=10)
    with ExitStack() as stack:
        for _ in range(9):
            clock.now += 1
            stack.enter_context(quotas.entered("greedy"))
        clock.now += 1
        with pytest.raises(QuotaExceeded, match="max_share"), quotas.entered("greedy"):
            pass
        with quotas.entered("modest"):
            pass
    quotas, _ = a_quotas(None, places=10)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(quotas.entered(""))
    assert [places_of(TenantPolicy(), n) for n in (1, 2, 3, 10, 100)] == [1, 1, 2, 9, 90]


def test_requests_per_minute(path: Path) -> None:
    quotas, clock = a_quotas(path)
    for _ in range(10):  # ten seconds' worth at once
        with quotas.entered("someone"):
            pass
    with pytest.raises(QuotaExceeded) as caught, quotas.entered("someone"):
        pass
    retry, failure = caught.value.details()
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == pytest.approx(1e9)
    assert isinstance(failure, error_details_pb2.QuotaFailure)
    (violation,) = failure.violations
    assert violation.subject == "tenant:someone"
    assert violation.description == "requests_per_minute: requests_per_minute is 60"
    clock.now += 1
    with quotas.entered("someone"), quotas.entered("another"):
        pass


def test_tokens_per_minute_are_of_prompt_and_answer(path: Path) -> None:
    quotas, clock = a_quotas(path)
    with quotas.entered("acme") as meter:
        meter.prompt(50)
        meter.answer(250)  # 300 of a bucket of 100
    with quotas.entered("acme") as meter, pytest.raises(QuotaExceeded, match="tokens_per_minute") as caught:
        meter.prompt(10)
    assert caught.value.retry_after == pytest.approx(21)
    clock.now += 21
    with quotas.entered("acme") as meter:
        meter.prompt(10)
    clock.now += 60
    with quotas.entered("acme") as meter:
        meter.prompt(5000)  # larger than the bucket: from a full one, and then owed


def test_limits_change_while_requests_run(path: Path) -> None:
    tenants = Tenants(path)
    clock = Clock()
    quotas = Quotas(tenants, 100, clock)
    with quotas.entered("acme"), quotas.entered("acme"):
        path.write_text(FILE.replace("max_concurrency = 2", "max_concurrency = 3"))
        tenants.reload()
        with quotas.entered("acme"):
            pass


def test_forgotten_when_idle(path: Path) -> None:
    quotas, clock = a_quotas(path)
    for number in range(1500):
        with quotas.entered(f"tenant-{number}"):
            clock.now += 0.1
    assert len(quotas._states) < 1100
