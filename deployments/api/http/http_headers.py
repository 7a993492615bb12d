"""What Serve runs before anything of its own, for each HTTP request of a router's replica or of its proxies
(RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, cluster/serve_settings.py).

Serve decodes some headers as UTF-8, and one that is not ends in a plain 500; it sends back whatever X-Request-Id it
finds in the request, and obeys headers of its own from any client.
"""

from __future__ import annotations

from ray.serve._private.constants import (
    SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    SERVE_HTTP_REQUEST_ID_HEADER,
    SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    SERVE_MULTIPLEXED_MODEL_ID,
    SERVE_SESSION_ID,
)
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import InvalidRequestError
from deployments.api.calls import request_id
from deployments.api.http.http_calls import REQUEST_ID_HEADER, error_response


def canonical(name: str) -> str:
    """As Serve compares them."""
    return name.lower().replace("-", "_")


DECODED_BY_SERVE = frozenset(
    canonical(name)
    for name in (
        SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        SERVE_HTTP_REQUEST_ID_HEADER,
        SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        SERVE_MULTIPLEXED_MODEL_ID,
        SERVE_SESSION_ID,
        "traceparent",
        "tracestate",
    )
)
REQUEST_ID_KEY = SERVE_HTTP_REQUEST_ID_HEADER.encode()
# By these a client would make Serve go on for it when it has left, or end its request in Serve's own form.
NOT_FOR_SERVE = frozenset(
    name.encode() for name in (SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER, SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER)
)


def middlewares() -> list[Middleware]:
    """Called by Serve."""
    return [Middleware(HeadersMiddleware)]


class HeadersMiddleware:
    """Every request has one X-Request-Id from here on, which Serve sends back: the client's where it can be taken."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        presented = next((value.decode("latin-1") for name, value in headers if name == REQUEST_ID_KEY), None)
        id = request_id(presented)
        kept = [each for each in headers if each[0] not in {REQUEST_ID_KEY, *NOT_FOR_SERVE}]
        scope["headers"] = [*kept, (REQUEST_ID_KEY, id.encode())]
        try:
            check_headers(headers)
        except InvalidRequestError as error:
            response = error_response(error)
            response.headers[REQUEST_ID_HEADER] = id
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def check_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Raises InvalidRequestError."""
    for key, value in headers:
        name = key.decode("latin-1")
        if canonical(name) in DECODED_BY_SERVE and not is_utf8(value):
            raise InvalidRequestError(f"header {name}: found {value[:100]!r}, expected UTF-8", name)


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
