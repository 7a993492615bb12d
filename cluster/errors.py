"""Every error nibble raises on purpose.

NibbleError
├── ConfigError              a value in the configuration or on the command line
├── CheckpointError          the checkpoint folder cannot be converted as it is
│   ├── HubUnavailableError  the Hub cannot be asked now: what was kept of the checkpoint may do
│   └── NoRepositoryError    the Hub has no such repository, or shows it to others only
├── ConversionError          a conversion task or the check of its result failed
├── ArtifactError            an artifact is missing, damaged or does not fit its manifest
├── EngineError              an engine cannot be loaded on this node, or failed while running
└── RequestError             something about one request
    ├── InvalidRequestError  a field of the request; `field` names it
    ├── RequestTooLargeError more bytes than are read of one request
    ├── UnauthenticatedError no API key, or an unknown one
    ├── ModelNotFoundError   no such served model
    ├── RetryLaterError      not now; try again after `retry_after_s`
    │   ├── QueueFullError   the model's queue is full
    │   └── RateLimitError   the API key's own limits are used up
    ├── DeadlineError        the request's time is over
    └── UnavailableError     no replica is ready yet

A message says which field or file, what was found, what is allowed and what to do. HTTP and gRPC codes are
decided in one place, `deployments/error_statuses.py`.
"""

from __future__ import annotations


class NibbleError(Exception):
    """Base of every error nibble raises on purpose; its message is meant for the person who can act on it."""


class ConfigError(NibbleError):
    pass


class CheckpointError(NibbleError):
    pass


class HubUnavailableError(CheckpointError):
    """Offline, unreachable, limiting the rate, or broken."""


class NoRepositoryError(CheckpointError):
    """401 or 404: the Hub answers the former where no token was sent, whether a repository is private or missing."""


class ConversionError(NibbleError):
    pass


class ArtifactError(NibbleError):
    pass


class EngineError(NibbleError):
    pass


class RequestError(NibbleError):
    pass


class InvalidRequestError(RequestError):
    """A field of a request that cannot be accepted; `field` is its name on the wire."""

    def __init__(self, message: str, field: str | None = None) -> None:
        # Both go to Exception.args, so that the error survives pickling across Ray processes.
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


class RequestTooLargeError(RequestError):
    pass


class UnauthenticatedError(RequestError):
    pass


class ModelNotFoundError(RequestError):
    pass


class RetryLaterError(RequestError):
    """What may succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class QueueFullError(RetryLaterError):
    pass


class RateLimitError(RetryLaterError):
    pass


class DeadlineError(RequestError):
    pass


class UnavailableError(RequestError):
    pass
