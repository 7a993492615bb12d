"""The one place where nibble's errors become HTTP statuses and gRPC codes."""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc

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


class Status(NamedTuple):
    http: int
    grpc: grpc.StatusCode
    type: str  # OpenAI's error type
    code: str | None = None  # OpenAI's error code


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


def headers_of(error: Exception) -> dict[str, str]:
    """The headers that tell a client what to do: when to come back, how to authenticate."""
    if isinstance(error, RetryLaterError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, UnauthenticatedError):
        return {"WWW-Authenticate": "Bearer"}
    return {}
