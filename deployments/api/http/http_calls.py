"""What every HTTP request passes on its way in and out: its id, the key, the body's limit, one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import NibbleError
from cluster.serve_settings import SERVE_LOGGER
from deployments.api.access import bearer_key
from deployments.api.calls import LONGEST_NAME, SESSION_HEADER, Call
from deployments.api.http.http_bodies import plain
from deployments.api.operations import Operations
from deployments.error_statuses import headers_of, openai_error, status_of

logger = logging.getLogger(SERVE_LOGGER)

REQUEST_ID_HEADER = "X-Request-Id"
METRICS = "/metrics"
PROBES = ("/healthz", "/readyz", "/health", "/ping", METRICS)  # asked every few seconds: neither logged nor counted
UNROUTED = "other"  # in the metrics, where no route was found or looked for: the paths of clients are without number
PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")  # what wants a key where there are keys
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


def call_of(request: Request) -> HttpCall:
    call: HttpCall = request.state.call
    return call


class CallMiddleware:
    """Pure ASGI, since a stream must reach the client as it comes and end when the client leaves."""

    def __init__(self, app: ASGIApp, get_operations: Callable[[], Operations]) -> None:
        self._app = app
        self._get_operations = get_operations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        operations, headers, path = self._get_operations(), Headers(scope=scope), scope["path"]
        method = f"{scope['method']} {path[:LONGEST_NAME]}"
        head = scope["method"] == "HEAD"
        if head:  # a GET whose answer has no body
            scope = {**scope, "method": "GET"}
        presented = headers.get(REQUEST_ID_HEADER)
        call = HttpCall(operations.calls.begin("http", method, presented, headers))
        call.record.session = headers.get(SESSION_HEADER)
        scope.setdefault("state", {})["call"] = call
        status, complete = 0, False

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in call.record.budget().items():
                    MutableHeaders(scope=message)[name] = value
                # Serve puts an id into every request that has none, and the request's into the response, after this.
                if presented is None:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = call.record.request_id
            elif head:
                message = {**message, "body": b""}
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            if path == METRICS:  # it takes no place among a key's requests
                operations.calls.access.identify(bearer_key(headers.get("authorization")))
            elif path.startswith(PROTECTED):
                call.record.admit(bearer_key(headers.get("authorization")))
            await self._app(scope, plain(receive, headers, operations.limits.body_bytes), answer)
        except ClientDisconnect:  # while it sent its body: there is nobody to tell
            pass
        except Exception as error:  # noqa: BLE001 - logged, and told to the client where it still can be
            call.failed(error)
            if not status:
                await error_response(error)(scope, receive, answer)
        finally:
            if path not in PROBES:
                call.record.route = getattr(scope.get("route"), "path", UNROUTED)
                call.record.end(status if complete else CLIENT_LEFT, call.error)


def error_response(error: Exception) -> JSONResponse:
    return JSONResponse(openai_error(error), status_of(error).http, headers=headers_of(error))
