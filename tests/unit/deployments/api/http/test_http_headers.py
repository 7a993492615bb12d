"""The headers of a request as Serve gets them: in front of its own middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deployments.api.http.http_headers import middlewares
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import client_of

BODY = {"model": "echo", "prompt": "to be or not"}


@pytest.fixture
async def client(model: EchoModel) -> AsyncIterator[httpx.AsyncClient]:
    """Starlette's would encode headers anew."""
    (middleware,) = middlewares()
    transport = httpx.ASGITransport(middleware.cls(client_of(model).app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        (["job-7"], True),
        ([], False),
        (["a b"], False),
        ([""], False),
        (["x" * 129], False),
        (["job-7", "job-8"], True),
        (["a b", "job-8"], False),
    ],
)
async def test_an_answer_has_one_request_id(client: httpx.AsyncClient, sent: list[str], taken: bool) -> None:
    response = await client.post("/v1/completions", json=BODY, headers=[("X-Request-Id", id) for id in sent])
    (id,) = response.headers.get_list("X-Request-Id")
    assert response.json()["id"] == f"cmpl-{id}"
    assert (id in sent) == taken


@pytest.mark.parametrize(
    "name",
    ["X-Request-Id", "X-Session-Id", "x_session_id", "Traceparent", "tracestate", "X-Request-Timeout-Seconds",
     "X-Request-Disconnect-Disabled", "Serve-Multiplexed-Model-Id"],
)  # fmt: skip
async def test_a_header_that_serve_could_not_decode_is_refused(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get("/v1/models", headers=[(name.encode(), b"a\xff")])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"] == f"header {name.lower()}: found b'a\\xff', expected UTF-8"
    assert len(response.headers.get_list("X-Request-Id")) == 1


async def test_other_headers_may_have_any_bytes(client: httpx.AsyncClient) -> None:
    headers = [(b"User-Agent", b"\xff"), (b"Authorization", b"Bearer \xff"), (b"X-Session-Id", "ü".encode())]
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_client_does_not_tell_serve_what_to_do() -> None:
    seen = []

    async def serves(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await PlainTextResponse("")(scope, receive, send)

    (middleware,) = middlewares()
    transport = httpx.ASGITransport(middleware.cls(serves))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"X-Request-Disconnect-Disabled": "?1", "X-Request-Timeout-Seconds": "1", "X-Session-Id": "a"}
        assert (await client.get("/", headers=headers)).status_code == 200
    assert b"x-session-id" in seen
    assert not {b"x-request-disconnect-disabled", b"x-request-timeout-seconds"} & {*seen}
