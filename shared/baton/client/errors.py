"""A failed call, in words a program can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request."""

    field: str
    """Path of the field, for example `sampling.top_p`."""
    description: str


class BatonRpcError(Exception):
    """A call failed.

    Attributes:
        code: gRPC status code.
        message: the server's (or gRPC's own) text.
        reason: stable upper-case word of the server, for example "OVERLOADED"; "" when the server did not say.
        violations: the wrong fields, for INVALID_ARGUMENT.
        retry_after: seconds to wait before trying again; None: the server did not say.
        request_id: the request's id in the server's logs; "" when unknown.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(f"{code.name}: {message}" if message else code.name)
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = violations
        self.retry_after = retry_after
        self.request_id = request_id


def wrap(error: grpc.RpcError) -> BatonRpcError:
    """The client's error for gRPC's, google.rpc details unpacked. Details that do not parse are left out."""
    call = cast("grpc.Call", error)  # what grpc raises is always both; its types do not say so
    reason, request_id = "", ""
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):
        status = None
    for box in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        if box.Unpack(info):
            reason = info.reason
        elif box.Unpack(bad):
            violations += [FieldViolation(entry.field, entry.description) for entry in bad.field_violations]
        elif box.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        elif box.Unpack(request):
            request_id = request.request_id
    return BatonRpcError(
        call.code(),
        call.details() or "",
        reason=reason,
        violations=tuple(violations),
        retry_after=retry_after,
        request_id=request_id,
    )
