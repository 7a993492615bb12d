from __future__ import annotations

import pytest

from cluster import errors
from cluster.errors import QueueFullError, RateLimitError, RequestError, UnauthenticatedError, UnavailableError
from deployments.error_statuses import STATUSES, headers_of, openai_error, status_of


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, RequestError) and not kind.__subclasses__()
    ],
)
def test_every_error_of_a_request_has_a_status(kind: type[RequestError]) -> None:
    assert kind in STATUSES
    assert 400 <= status_of(kind("a")).http <= 504


@pytest.mark.parametrize(
    ("name", "http", "grpc", "code"),
    [
        ("UnauthenticatedError", 401, "UNAUTHENTICATED", "invalid_api_key"),
        ("RateLimitError", 429, "RESOURCE_EXHAUSTED", "rate_limit_exceeded"),
        ("RequestTooLargeError", 413, "INVALID_ARGUMENT", "request_too_large"),
        ("DeadlineError", 504, "DEADLINE_EXCEEDED", "deadline_exceeded"),
    ],
)
def test_what_clients_are_told(name: str, http: int, grpc: str, code: str) -> None:
    error = getattr(errors, name)("why")
    status = status_of(error)
    assert (status.http, status.grpc.name) == (http, grpc)
    assert openai_error(error)["error"] == {"message": "why", "type": status.type, "param": None, "code": code}


def test_the_headers_say_what_to_do() -> None:
    assert headers_of(QueueFullError("a", 3)) == {"Retry-After": "3"}
    assert headers_of(RateLimitError("a", 17)) == {"Retry-After": "17"}
    assert headers_of(UnauthenticatedError("a")) == {"WWW-Authenticate": "Bearer"}
    assert headers_of(UnavailableError("a")) == headers_of(ValueError("a")) == {}
