"""The mesh's errors, in its own terms, and the one place that turns them into gRPC statuses.

Every error a service raises on purpose is a `BatonError`. It knows its status code, a stable reason (ErrorInfo, domain
"baton"), and the google.rpc details a client can act on. Anything else is a bug and becomes INTERNAL with a fixed text.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "baton"


class BatonError(Exception):
    """An error with a gRPC status.

    Attributes:
        code: the status code.
        reason: stable upper-case word for ErrorInfo; listed in docs/errors.md.
    """

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    reason: str = "INTERNAL"

    def details(self) -> list[Message]:
        """google.rpc messages that go with the status."""
        return []


class InvalidArgument(BatonError):
    """The request is wrong. Names the field by its path, for example `sampling.top_p` or `messages[2].role`."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def details(self) -> list[Message]:
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.description)
        return [error_details_pb2.BadRequest(field_violations=[violation])]


class NotFound(BatonError):
    """What was asked for does not exist here."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class ModelNotFound(InvalidArgument):
    """No such model; names the field, as a bad argument does."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class FailedPrecondition(BatonError):
    """The two sides do not fit: another model, another wire version."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class FingerprintMismatch(FailedPrecondition):
    """The other side runs other weights, configuration, element type or layer shapes."""

    reason = "FINGERPRINT_MISMATCH"


class _Retryable(BatonError):
    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def details(self) -> list[Message]:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(self.retry_after * 1e9))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]


class Overloaded(_Retryable):
    """No room: refused before anything was started. Retry after `retry_after` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class DeadlineUnreachable(Overloaded):
    """By all that is known the first token would come after the caller's deadline; nothing was started."""

    reason = "DEADLINE_UNREACHABLE"


class QuotaExceeded(_Retryable):
    """A limit of the caller's tenant is reached, whatever room there is; nothing was started.

    Args:
        tenant: whose limit.
        limit: its name in the tenants file.
        value: what it is, in words.
        retry_after: seconds.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"

    def __init__(self, tenant: str, limit: str, value: str, retry_after: float) -> None:
        super().__init__(f"{limit} is {value}", retry_after)
        self.tenant = tenant
        self.limit = limit

    def details(self) -> list[Message]:
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=f"tenant:{self.tenant or 'default'}", description=f"{self.limit}: {self}"
        )
        return [*super().details(), error_details_pb2.QuotaFailure(violations=[violation])]


class SlowReader(_Retryable):
    """The client does not read its stream, and the unsent tokens reached their bound."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_READER"


class Unavailable(_Retryable):
    """No worker can serve this now. Retry after `retry_after` seconds."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class WorkerLost(Unavailable):
    """The worker that ran the request is gone."""

    reason = "WORKER_LOST"


class PoisonRequest(FailedPrecondition):
    """The request breaks the engines that compute it: it was tried twice, and is not to be tried again."""

    reason = "POISON_REQUEST"

    def __init__(self) -> None:
        super().__init__("this request breaks the worker that computes it; it was tried twice")


class DeadlineExceeded(BatonError):
    """The caller's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo reason in a callee's status; empty: it gave none, or did not get to it."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        return ""
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""


def is_crash(error: grpc.aio.AioRpcError) -> bool:
    """Whether the callee's engine died, or failed a step, under the call."""
    return reason_of(error) in (WorkerLost.reason, BatonError.reason)


class Unauthenticated(BatonError):
    """Credentials are missing, or not known here. Never says what was sent."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class PermissionDenied(BatonError):
    """The credentials are good, but not for this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


def to_status(error: BatonError, request_id: str) -> grpc.Status:
    """The gRPC status of an error, with ErrorInfo and RequestInfo besides its own details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    packed = []
    for detail in [info, *error.details(), error_details_pb2.RequestInfo(request_id=request_id)]:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    status = status_pb2.Status(code=error.code.value[0], message=str(error), details=packed)
    return rpc_status.to_status(status)
