"""Which web pages may call the server from a browser (`http.cors_origins`)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
READABLE = ("X-Request-Id", "Retry-After")  # of an answer's headers, by the page


class Cors:
    """Outside of what checks keys: a browser sends none with the question whether it may ask (the preflight), and a
    page may read why it was refused. Keys are sent by the page itself, so that cookies are not allowed."""

    def __init__(self, app: ASGIApp, get_origins: Callable[[], tuple[str, ...]]) -> None:
        self._app = app
        self._get_origins = get_origins
        self._origins: tuple[str, ...] = ()
        self._allowing = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = self._get_origins() if scope["type"] == "http" else ()
        if origins != self._origins:  # the configuration has changed
            self._origins = origins
            self._allowing = CORSMiddleware(
                self._app, allow_origins=origins, allow_methods=METHODS, allow_headers=["*"], expose_headers=READABLE
            )
        await (self._allowing if origins else self._app)(scope, receive, send)
