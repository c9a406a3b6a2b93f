"""Errors: every one is in the docs, and arrives with its code, its reason, the request's id, and its details."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from baton.rpc import errors
from baton.rpc.errors import BatonError, InvalidArgument, Overloaded, to_status

DOC = Path(__file__).parents[2] / "docs" / "errors.md"


def kinds(root: type[BatonError] = BatonError) -> Iterator[type[BatonError]]:
    if root is BatonError or not root.__name__.startswith("_"):
        yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def unpacked(error: BatonError) -> status_pb2.Status:
    metadata = dict(to_status(error, "r1").trailing_metadata)
    return status_pb2.Status.FromString(metadata["grpc-status-details-bin"])


def test_every_error_is_documented() -> None:
    rows = set(re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", DOC.read_text(), re.MULTILINE))
    assert rows == {(kind.code.name, kind.reason) for kind in kinds()}


def test_bad_field_is_named() -> None:
    status = unpacked(InvalidArgument("sampling.top_p", "must be in (0, 1]"))
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status.message == "sampling.top_p: must be in (0, 1]"
    info, request, violations = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RequestInfo(),
        error_details_pb2.BadRequest(),
    )
    for message in (info, request, violations):
        assert any(detail.Unpack(message) for detail in status.details)
    assert (info.domain, info.reason) == ("baton", "INVALID_ARGUMENT")
    assert request.request_id == "r1"
    assert [violation.field for violation in violations.field_violations] == ["sampling.top_p"]


@pytest.mark.parametrize("seconds", [0.25, 3.0])
def test_retry_delay(seconds: float) -> None:
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in unpacked(Overloaded("full", seconds)).details)
    assert retry.retry_delay.ToNanoseconds() == seconds * 1e9
