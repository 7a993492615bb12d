"""What every request passes on its way in and out: its id, its key and the limits of that, its log line."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LoggingConfig
from deployments.api.access import Access, hash_of
from deployments.api.calls import Calls
from deployments.api.operations import Operations
from deployments.routing.router import Router
from tests.unit.deployments.api.http.test_http_api import BODY
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import client_for, http_api


def test_the_request_id_is_the_client_s_or_new(client: TestClient) -> None:
    response = client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "job-7"})
    assert (response.headers["X-Request-Id"], response.json()["id"]) == ("job-7", "cmpl-job-7")
    ids = {client.get(path).headers["X-Request-Id"] for path in ("/v1/models", "/healthz", "/nowhere")}
    assert len(ids) == 3
    assert client.post("/v1/completions", content="{").headers["X-Request-Id"]


def test_one_log_line_a_request(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ray.serve.requests"):
        client.post("/v1/completions", json=BODY | {"stream": True})
        client.post("/v1/completions", json=BODY | {"model": "gpt-5"})
        client.get("/readyz")
    ok, unknown = (json.loads(record.message) for record in caplog.records if record.name == "ray.serve.requests")
    assert (ok["status"], ok["model"], ok["prompt_tokens"], ok["completion_tokens"]) == (200, "echo", 4, 4)
    assert ok["first_token_seconds"] is not None
    assert (unknown["status"], unknown["model"]) == (404, "gpt-5")
    assert "or not" not in caplog.text


def test_keys_guard_the_api_and_not_the_probes(model: EchoModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: alice, sha256: {hashlib.sha256(b'secret').hexdigest()}, max_concurrent: 1}}\n")
    router, calls = Router({"echo": model}), Calls(Access(AuthConfig(api_keys_file=keys)), LoggingConfig())
    client = TestClient(http_api(Operations(router, calls)))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        refused = client.post("/v1/completions", json=BODY, headers=headers)
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for _ in range(2):  # max_concurrent is given back, also after a stream
        answer = client.post(
            "/v1/completions", json=BODY | {"stream": True}, headers={"Authorization": "Bearer secret"}
        )
        assert answer.status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/healthz").status_code == 200


async def test_a_client_that_leaves_while_it_sends_its_body_is_no_error(
    model: EchoModel, caplog: pytest.LogCaptureFixture
) -> None:
    operations = Operations(Router({"echo": model}), Calls(Access(AuthConfig()), LoggingConfig()))
    messages = iter([{"type": "http.request", "body": b'{"mod', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    with caplog.at_level(logging.INFO, logger="ray.serve.requests"):
        await http_api(operations)(scope, receive, send)
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "ray.serve.requests"]
    assert (line["status"], line["error"]) == (499, None)
    assert not sent
    assert not [record for record in caplog.records if record.exc_info]


def test_a_key_with_limited_tokens_is_told_what_is_left(model: EchoModel, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    entries = [{"name": "a", "sha256": hash_of("a"), "tokens_per_minute": 10}, {"name": "b", "sha256": hash_of("b")}]
    keys.write_text(json.dumps(entries))
    client = client_for({"echo": model}, auth=AuthConfig(api_keys_file=keys))
    body = {"model": "echo", "prompt": "a b"}
    answers = [client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}) for key in "ab"]
    told = {name: value for name, value in answers[0].headers.items() if name.startswith("x-ratelimit")}
    assert told["x-ratelimit-limit-tokens"] == "10"
    assert 6 <= int(told["x-ratelimit-remaining-tokens"]) < 10, "4 were taken, and it fills again"
    assert re.fullmatch(r"[0-9]+s", told["x-ratelimit-reset-tokens"])
    assert not any(name.startswith("x-ratelimit") for name in answers[1].headers)
