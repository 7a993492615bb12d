"""What every HTTP request passes on its way in and out: its id, the key, the body's limit, one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import NibbleError, RequestTooLargeError
from deployments.api.access import bearer_key
from deployments.api.calls import LONGEST_NAME, Call, Calls
from deployments.routing.router import Router
from deployments.status import headers_of, openai_error, status_of

logger = logging.getLogger("ray.serve")

REQUEST_ID_HEADER = "X-Request-Id"
PROBES = ("/healthz", "/readyz")  # asked every few seconds: not logged
PROTECTED = "/v1/"  # what wants a key where there are keys
CLIENT_LEFT = 499  # nginx's number for a client that closed the connection before its answer was complete


class HttpCall:
    """One request's record, in `request.state`; `error` is what its answer tells, for the log."""

    def __init__(self, record: Call) -> None:
        self.record = record
        self.error: Exception | None = None

    def failed(self, error: Exception) -> None:
        self.error = error
        if not isinstance(error, NibbleError):
            logger.error("request %s: unforeseen error", self.record.request_id, exc_info=error)


class CallMiddleware:
    """Pure ASGI, since a stream must reach the client as it comes and end when the client leaves."""

    def __init__(self, app: ASGIApp, get_router: Callable[[], Router], get_calls: Callable[[], Calls]) -> None:
        self._app = app
        self._get_router = get_router
        self._get_calls = get_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        method = f"{scope['method']} {path[:LONGEST_NAME]}"
        presented = headers.get(REQUEST_ID_HEADER)
        call = HttpCall(self._get_calls().begin("http", method, presented))
        scope.setdefault("state", {})["call"] = call
        status, complete = 0, False

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                # Serve puts an id into every request that has none, and that same id into the response, after this.
                if call.record.request_id != presented:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = call.record.request_id
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            if path.startswith(PROTECTED):
                call.record.admit(bearer_key(headers.get("authorization")))
            limit = self._get_router().limits.body_bytes
            await self._app(scope, bounded(receive, headers.get("content-length"), limit), answer)
        except Exception as error:  # noqa: BLE001 - logged, and told to the client where it still can be
            call.failed(error)
            if not status:
                await error_response(error)(scope, receive, answer)
        finally:
            if path not in PROBES:
                call.record.end(status if complete else CLIENT_LEFT, call.error)


def error_response(error: Exception) -> JSONResponse:
    return JSONResponse(openai_error(error), status_of(error).http, headers=headers_of(error))


def bounded(receive: Receive, content_length: str | None, limit: int) -> Receive:
    """Raises RequestTooLargeError, when the body is read, as soon as it is known to be longer than `limit` bytes."""
    announced = content_length is not None and content_length.isdecimal() and int(content_length) > limit
    received = 0

    async def read() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if announced or received > limit:
            raise RequestTooLargeError(f"body: more than {limit} bytes, allowed are up to {limit} (limits.body_bytes)")
        return message

    return read
