"""What a decode call's failure means for its request. Pure."""

from __future__ import annotations

import enum

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton.rpc.errors import (
    BatonError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Overloaded,
    PoisonRequest,
    Unavailable,
    WorkerLost,
    reason_of,
)


class Loss(enum.Enum):
    """Why a worker does not go on with a request; another one may."""

    GONE = "gone"  # killed, cut off, hung, or draining
    CRASHED = "crashed"  # its engine died, or failed a step, under the request
    FULL = "full"  # it refused for lack of room
    UNFIT = "unfit"  # another model, or the request is more than its whole pool holds
    BROKEN = "broken"  # a bug or a broken stream


class AttemptLost(Exception):
    """An attempt failed in a way that another worker may not.

    Attributes:
        loss: what happened.
    """

    def __init__(self, loss: Loss, message: str) -> None:
        super().__init__(message)
        self.loss = loss


_LOSSES = {
    grpc.StatusCode.UNAVAILABLE: Loss.GONE,
    # We did not cancel it: the other side did, or its connection ended.
    grpc.StatusCode.CANCELLED: Loss.GONE,
    # Its certificates or tokens are not ours: for us it is not there.
    grpc.StatusCode.UNAUTHENTICATED: Loss.GONE,
    grpc.StatusCode.PERMISSION_DENIED: Loss.GONE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Loss.FULL,
    grpc.StatusCode.FAILED_PRECONDITION: Loss.UNFIT,
}


def meaning(error: grpc.aio.AioRpcError) -> BatonError | AttemptLost:
    """A decode call's status, as the client's error or as a reason to go on elsewhere."""
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the deadline passed")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument(_field(error), error.details() or "refused by the decode worker")
    loss, reason = _LOSSES.get(code, Loss.BROKEN), reason_of(error)
    if reason == PoisonRequest.reason:
        return PoisonRequest()
    if loss is Loss.GONE and reason == WorkerLost.reason:
        loss = Loss.CRASHED
    return AttemptLost(loss, f"{code.name}: {error.details()}")


def no_worker_left(last: AttemptLost | None) -> BatonError:
    """What the client gets when nobody is left to try."""
    match last.loss if last else None:
        case None:
            return Unavailable("no decode worker can serve this now")
        case Loss.FULL:
            return Overloaded("all decode workers are full")
        case Loss.UNFIT:
            return FailedPrecondition("no decode worker can hold this request")
        case _:
            return WorkerLost("the decode worker was lost and no other can take over")


def _field(error: grpc.aio.AioRpcError) -> str:
    """The field a worker's INVALID_ARGUMENT names."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        return "request"
    for detail in status.details if status else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad) and bad.field_violations:
            return str(bad.field_violations[0].field)
    return "request"
