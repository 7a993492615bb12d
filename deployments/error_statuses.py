"""The one place where nibble's errors become HTTP statuses and gRPC codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import (
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    NibbleError,
    QueueFullError,
    RateLimitError,
    RequestTooLargeError,
    RetryLaterError,
    UnauthenticatedError,
    UnavailableError,
)

# The domain of google.rpc.ErrorInfo: whose reasons these are.
DOMAIN = "nibble"


class Status(NamedTuple):
    http: int
    grpc: grpc.StatusCode
    type: str  # OpenAI's error type
    code: str | None = None  # OpenAI's error code

    @property
    def reason(self) -> str:
        """The reason in google.rpc.ErrorInfo, one for each error."""
        return (self.code or self.type.removesuffix("_error")).upper()


INTERNAL = Status(500, grpc.StatusCode.INTERNAL, "server_error", "internal_error")

STATUSES: dict[type[NibbleError], Status] = {
    InvalidRequestError: Status(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    RequestTooLargeError: Status(413, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error", "request_too_large"),
    UnauthenticatedError: Status(401, grpc.StatusCode.UNAUTHENTICATED, "invalid_request_error", "invalid_api_key"),
    ModelNotFoundError: Status(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error", "model_not_found"),
    QueueFullError: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error", "queue_full"),
    RateLimitError: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error", "rate_limit_exceeded"),
    DeadlineError: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED, "server_error", "deadline_exceeded"),
    UnavailableError: Status(503, grpc.StatusCode.UNAVAILABLE, "server_error", "no_replica"),
}


def status_of(error: Exception) -> Status:
    return STATUSES.get(type(error), INTERNAL) if isinstance(error, NibbleError) else INTERNAL


def public_message(error: Exception) -> str:
    """What a client may read: nibble's own messages, but nothing of an unforeseen error, which the log keeps."""
    return str(error) if isinstance(error, NibbleError) else "internal error; the server's log has the details"


def openai_error(error: Exception) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    field = error.field if isinstance(error, InvalidRequestError) else None
    return {"error": {"message": public_message(error), "type": status.type, "param": field, "code": status.code}}


def rpc_status(error: Exception) -> status_pb2.Status:
    """gRPC's structured form of an error: which one it is, the field that it is about, when to come back."""
    status = status_of(error)
    # A message may quote a lone surrogate, which protobuf refuses.
    message = public_message(error).encode("utf-8", "replace").decode()
    found = status_pb2.Status(code=status.grpc.value[0], message=message)
    found.details.add().Pack(error_details_pb2.ErrorInfo(reason=status.reason, domain=DOMAIN))
    if isinstance(error, InvalidRequestError) and error.field is not None:
        # Without a description: it would be the message again, and metadata has a limit.
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field)
        found.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, RetryLaterError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.seconds = error.retry_after_s
        found.details.add().Pack(retry)
    return found


def headers_of(error: Exception) -> dict[str, str]:
    """The headers that tell a client what to do: when to come back, how to authenticate."""
    if isinstance(error, RetryLaterError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, UnauthenticatedError):
        return {"WWW-Authenticate": "Bearer"}
    return {}
