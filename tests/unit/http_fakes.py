"""HTTP without a server: the app on a router of echoes."""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import Any

from ray.serve._private.http_util import RequestIdMiddleware
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.http.http_api import build_http_api
from deployments.api.operations import Operations
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel

CHAT = {"model": "echo", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi you"}]}

# The app that every test asks: building one costs more than most tests do. The operations are set for each request.
_OPERATIONS: ContextVar[Operations] = ContextVar("operations")
_API = build_http_api(_OPERATIONS.get)


def http_api(operations: Operations) -> ASGIApp:
    """Serves these operations, also while another such app serves others."""
    _API.openapi_schema = None  # it names the models, and the app keeps it from the first request for it on

    async def api(scope: Scope, receive: Receive, send: Send) -> None:
        _OPERATIONS.set(operations)
        await _API(scope, receive, send)

    return api


def client_of(model: EchoModel, **limits: Any) -> TestClient:
    return client_for({model.config.name: model, "absent": EchoModel("absent", ready=False)}, LimitsConfig(**limits))


def client_for(
    models: dict[str, EchoModel],
    limits: LimitsConfig | None = None,
    auth: AuthConfig | None = None,
    cors_origins: tuple[str, ...] = (),
) -> TestClient:
    calls = Calls(Access(auth or AuthConfig()), LoggingConfig())
    operations = Operations(Router(models, limits), calls, cors_origins)
    # In Serve's own middleware, as in a running cluster.
    api = RequestIdMiddleware(http_api(operations))
    return TestClient(api, raise_server_exceptions=False)


def events(text: str) -> list[Any]:
    blocks = [block for block in text.strip().split("\n\n") if not block.startswith(": ")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
