"""What every gRPC request passes on its way in and out: its id, the key, the message's limit, its error's code, one
line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import grpc
from grpc_status.rpc_status import to_status

from cluster.config import LimitsConfig
from cluster.errors import NibbleError, RequestTooLargeError
from cluster.serve_settings import SERVE_LOGGER
from deployments.api.access import bearer_key
from deployments.api.calls import SESSION_HEADER, Calls
from deployments.api.grpc.grpc_services import wellformed
from deployments.error_statuses import headers_of, public_message, rpc_status, status_of

logger = logging.getLogger(SERVE_LOGGER)

REQUEST_ID_KEY = "x-request-id"
API_KEY_KEY = "x-api-key"
# Of a call that ended before its answer did; a deadline that passed looks the same here.
CANCELLED = grpc.StatusCode.CANCELLED.name
# gRPC's limit of metadata is 8 KiB, and the message is in it twice.
MAX_DETAILS_BYTES = 2048


class StreamFailedError(Exception):
    """Ends a stream whose context has the error's code and message. It has no text: Serve logs what is raised, and the
    error's own may show a prompt."""


class GrpcCall:
    """One request, as a context manager around all that is done for it; an error ends the block and is told to the
    client. What then becomes of it, `errors` says: `returned` (the method returns an empty message, which is not sent),
    `raised` (a stream's method: where Serve has a proxy of its own, an error that is not raised would be lost) or
    `kept` (a stream that tells it in a message and goes on)."""

    def __init__(
        self,
        calls: Calls,
        method: str,
        grpc_context: Any,
        errors: Literal["returned", "raised", "kept"] = "returned",
        request_id: str | None = None,
    ) -> None:
        self._context = grpc_context
        self._errors = errors
        self._given = dict(grpc_context.invocation_metadata())
        self.record = calls.begin("grpc", method, request_id or self._given.get(REQUEST_ID_KEY), self._given)
        self.record.session = self._given.get(SESSION_HEADER)
        self.request_id = self.record.request_id
        self.error: Exception | None = None
        self._metadata = [(REQUEST_ID_KEY, self.request_id)]  # that goes back
        grpc_context.set_trailing_metadata(self._metadata)

    def admit(self, request: Any, limits: LimitsConfig) -> None:
        """Raises UnauthenticatedError, RateLimitError, RequestTooLargeError or, for a message that could not be
        parsed, InvalidRequestError."""
        self.record.admit(bearer_key(self._given.get("authorization")) or self._given.get(API_KEY_KEY))
        size = wellformed(request).ByteSize()
        if size > limits.body_bytes:
            raise RequestTooLargeError(
                f"message: found {size} bytes, allowed are up to {limits.body_bytes} (limits.body_bytes)"
            )

    def __enter__(self) -> GrpcCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            self.record.end(grpc.StatusCode.OK.name)
            return False
        if not isinstance(error, Exception):
            self.record.end(CANCELLED)
            return False
        self.error = error
        if not isinstance(error, NibbleError):
            logger.error("request %s: unforeseen error", self.request_id, exc_info=error)
        self.record.end(status_of(error).grpc.name, error)
        if self._errors != "kept":
            tell(self._context, error, self._metadata)
        if self._errors == "raised":
            raise StreamFailedError from None
        return True


@contextmanager
def telling(grpc_context: Any) -> Iterator[None]:
    """For a method that is not logged: an error of nibble's ends the block and is told to the client."""
    try:
        yield
    except NibbleError as error:
        tell(grpc_context, error)


def tell(grpc_context: Any, error: Exception, metadata: Sequence[tuple[str, str]] = ()) -> None:
    """Sets the call's code, message and trailing metadata, what else goes there included: hints, and the details as
    google.rpc.Status unless they are too long. Serve sends the metadata only of a method that returns."""
    rich = rpc_status(error)
    details = to_status(rich).trailing_metadata if rich.ByteSize() <= MAX_DETAILS_BYTES else ()
    hints = [(name.lower(), value) for name, value in headers_of(error).items()]
    grpc_context.set_code(status_of(error).grpc)
    grpc_context.set_details(public_message(error))
    grpc_context.set_trailing_metadata([*metadata, *hints, *details])
