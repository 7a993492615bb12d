"""HTTP without a server: the app on a router of echoes."""

from __future__ import annotations

import json
from typing import Any

from ray.serve._private.http_util import RequestIdMiddleware
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.http_api import build_http_api
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel

CHAT = {"model": "echo", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi you"}]}


def client_of(model: EchoModel, **limits: Any) -> TestClient:
    router = Router({"echo": model, "absent": EchoModel("absent", ready=False)}, LimitsConfig(**limits))
    calls = Calls(Access(AuthConfig()), LoggingConfig())
    # In Serve's own middleware, as in a running cluster.
    api = RequestIdMiddleware(build_http_api(lambda: router, lambda: calls))
    return TestClient(api, raise_server_exceptions=False)


def events(text: str) -> list[Any]:
    blocks = [block for block in text.strip().split("\n\n") if not block.startswith(": ")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
