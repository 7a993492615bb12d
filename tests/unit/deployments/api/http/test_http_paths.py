"""What else HTTP clients expect: vLLM's paths, HEAD, gzip, and pages of other origins in a browser."""

from __future__ import annotations

import gzip
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LimitsConfig
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import client_for, client_of

BODY = {"model": "echo", "prompt": "to be or not"}
ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def guarded(folder: Path, cors_origins: tuple[str, ...] = ()) -> TestClient:
    """With one API key, `secret`."""
    keys = folder / "keys.yaml"
    keys.write_text(f"- {{name: alice, sha256: {hashlib.sha256(b'secret').hexdigest()}}}\n")
    return client_for({"echo": EchoModel()}, auth=AuthConfig(api_keys_file=keys), cors_origins=cors_origins)


def packed(body: Any) -> dict[str, Any]:
    return {"content": gzip.compress(json.dumps(body).encode()), "headers": {"Content-Encoding": "gzip"}}


def test_probes_by_all_their_names(tmp_path: Path) -> None:
    client = guarded(tmp_path)
    for path in ("/healthz", "/health", "/ping"):
        assert client.get(path).status_code == 200
    assert client.post("/ping").status_code == 200
    assert client.get("/version").json() == {"version": version("nibble-serve")}


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/version", "/v1/models", "/openapi.json"])
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/completions").status_code == 405


def test_vllm_s_paths_need_no_model_where_one_is_served(client: TestClient, tmp_path: Path) -> None:
    one = client_for({"echo": EchoModel(aliases=("other",))})
    assert one.post("/tokenize", json={"prompt": "a bc"}).json() == {
        "tokens": [1, 1, 2],
        "count": 3,
        "max_model_len": 512,
    }
    assert one.post("/detokenize", json={"tokens": [2, 3]}).json() == {"prompt": "xx xxx"}
    assert one.get("/tokenizer_info").json() == {"tokenizer_class": "echo"}
    assert one.post("/v1/tokenize", json={"prompt": "a"}).status_code == 400
    # Of several it must be named.
    for answer in (client.post("/tokenize", json={"prompt": "a"}), client.get("/tokenizer_info")):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert client.get("/tokenizer_info?model=echo").json() == {"tokenizer_class": "echo"}
    assert client.get("/tokenizer_info?model=nothing").status_code == 404


def test_vllm_s_paths_want_a_key_as_the_others_do(tmp_path: Path) -> None:
    client, key = guarded(tmp_path), {"Authorization": "Bearer secret"}
    assert client.post("/tokenize", json={"prompt": "a"}).status_code == 401
    assert client.post("/detokenize", json={"tokens": []}).status_code == 401
    assert client.get("/tokenizer_info").status_code == 401
    assert client.get("/tokenizer_info", headers=key).status_code == 200


def test_a_packed_body_is_unpacked(client: TestClient) -> None:
    answer = client.post("/v1/completions", **packed(BODY))
    assert answer.json()["choices"][0]["text"] == "to be or not "


def test_a_packed_body_is_bounded_by_what_it_holds() -> None:
    """A megabyte of spaces is a kilobyte of gzip; not a byte more than allowed is unpacked."""
    client = client_of(EchoModel(), body_bytes=2000)
    bomb = packed({**BODY, "user": " " * (1 << 20)})
    assert len(bomb["content"]) < 2000
    refused = client.post("/v1/completions", **bomb)
    assert refused.status_code == 413
    assert "allowed are up to 2000 (limits.body_bytes)" in refused.json()["error"]["message"]
    fitting = {**BODY, "user": " " * (2000 - len(json.dumps({**BODY, "user": ""})))}
    assert client.post("/v1/completions", **packed(fitting)).status_code == 200
    assert client.post("/v1/completions", **packed({**fitting, "user": fitting["user"] + " "})).status_code == 413


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "not valid gzip: Error -3"),
        (gzip.compress(b"{}")[:-9], "not valid gzip: it ends too early"),
        (b"", "not valid gzip: it ends too early"),
        (gzip.compress(b"{}") * 2, "not valid gzip: it goes on behind its end"),
    ],
    ids=["no gzip", "cut", "empty", "two"],  # else they would have the time that gzip writes
)
def test_what_cannot_be_unpacked_is_refused(client: TestClient, content: bytes, words: str) -> None:
    answer = client.post("/v1/completions", content=content, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)


def test_another_coding_is_refused_by_name(client: TestClient) -> None:
    answer = client.post("/v1/completions", json=BODY, headers={"Content-Encoding": "br"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Content-Encoding: found 'br', allowed are gzip and identity"
    assert client.post("/v1/completions", json=BODY, headers={"Content-Encoding": "identity"}).status_code == 200


def test_long_answers_are_packed_for_clients_that_can_unpack_them_but_no_stream(client: TestClient) -> None:
    long = BODY | {"prompt": "word " * 2000}
    for accepted, encoding in (("gzip", "gzip"), ("identity", None)):
        answer = client.post("/v1/completions", json=long, headers={"Accept-Encoding": accepted})
        assert answer.headers.get("content-encoding") == encoding
        assert answer.json()["choices"][0]["text"] == long["prompt"]
    for body in (BODY, long | {"stream": True}):
        answer = client.post("/v1/completions", json=body, headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in answer.headers


def test_a_page_of_an_allowed_origin_may_ask_before_it_shows_a_key(tmp_path: Path) -> None:
    client = guarded(tmp_path, (ORIGIN,))
    asked = client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in asked.headers["access-control-allow-headers"]
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": ORIGIN, "Authorization": "Bearer secret"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    refused = client.post("/v1/completions", json=BODY, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    assert "X-Request-Id" in refused.headers["access-control-expose-headers"]


def test_no_other_page_may(tmp_path: Path, client: TestClient) -> None:
    other = PREFLIGHT | {"Origin": "https://elsewhere.example.org"}
    listed = guarded(tmp_path, (ORIGIN,)).options("/v1/completions", headers=other)
    assert (listed.status_code, "access-control-allow-origin" in listed.headers) == (400, False)
    plain = client.options("/v1/completions", headers=PREFLIGHT)
    assert (plain.status_code, "access-control-allow-origin" in plain.headers) == (405, False)
    every = client_for({"echo": EchoModel()}, LimitsConfig(), cors_origins=("*",))
    assert every.options("/v1/completions", headers=other).headers["access-control-allow-origin"] == "*"
