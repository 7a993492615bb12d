from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError, QueueFullError
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import CHAT, client_of, events

BODY = {"model": "echo", "prompt": "to be or not"}
USAGE = {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_completion_is_openai_s_object(client: TestClient) -> None:
    body = client.post("/v1/completions", json=BODY).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"text": "to be or not ", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == USAGE | {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_a_stream_is_events_ended_by_done(client: TestClient, model: EchoModel) -> None:
    response = client.post("/v1/completions", json=BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "to be or not "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert model.closed == 1


def test_fields_reach_the_replica(client: TestClient, model: EchoModel) -> None:
    client.post(
        "/v1/completions",
        json=BODY | {"max_tokens": 7, "temperature": 0, "top_k": 3, "seed": 5, "stop": "x"} | {"stop_token_ids": [7]},
    )
    (request,) = model.requests
    assert (request.max_tokens, request.stop, request.stop_token_ids) == (7, ("x",), (7,))
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0, 3, 5)


def test_null_counts_as_left_out(client: TestClient, model: EchoModel) -> None:
    assert client.post("/v1/completions", json=BODY | {"stop": None, "seed": None}).status_code == 200
    assert model.requests[0].stop == ()


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"max_tokens": -3}, "max_tokens", "found -3; input should be greater than or equal to 0"),
        ({"max_tokens": "many"}, "max_tokens", "found 'many'"),
        ({"max_tokens": True}, "max_tokens", "found True"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "found -2"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"seed": -(1 << 63) - 1}, "seed", "greater than or equal to"),
        ({"stop": ["a"] * 129}, "stop", "at most 128 items"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128 items"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"stop": [""]}, "stop[0]", "at least 1"),
        ({"prompt": 5}, "prompt", "found 5; allowed are a string, a list of strings, token ids"),
        ({"prompt": []}, "prompt", "found []"),
        ({"prompt": ["a", 5]}, "prompt", "found ['a', 5]"),
        ({"prompt": [-1]}, "prompt", "allowed are a string"),
        ({"n": 0}, "n", "found 0"),
        ({"n": 33}, "n", "asks for 33 sequences, allowed are 32"),
        ({"prompt": ["a"] * 33}, "prompt", "asks for 33 sequences"),
        ({"n": 3, "best_of": 2}, "best_of", "allowed are n, 3, and more"),
        ({"best_of": 2, "stream": True}, "best_of", "a stream cannot choose"),
        ({"min_tokens": 17}, "min_tokens", "allowed are 0 to max_tokens, 16"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "match pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
        ({"grammar": "start: /a/", "response_format": {"type": "json_object"}}, "grammar", "one of them"),
        ({"suffix": "x"}, "suffix", "found 'x', allowed are null: nothing is inserted"),
        ({"best_off": 2}, "best_off", "not supported; allowed are model"),
    ],
)
def test_a_wrong_field_is_named_with_its_range(
    client: TestClient, change: dict[str, Any], field: str, words: str
) -> None:
    response = client.post("/v1/completions", json=BODY | change)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize("body", ["{", "", "[1]", '"x"', "NaN", '{"model": NaN}', b"\xff\xfe", "[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(client: TestClient, body: Any) -> None:
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("body: ")


def test_a_missing_field_is_named(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "echo"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "prompt: missing, but required"


def test_an_unknown_model_is_404_and_names_the_served(client: TestClient) -> None:
    response = client.post("/v1/completions", json=BODY | {"model": "gpt-5"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "served are absent, echo" in response.json()["error"]["message"]


def test_a_model_without_replica_is_503(client: TestClient) -> None:
    response = client.post("/v1/completions", json=BODY | {"model": "absent"})
    assert response.status_code == 503
    assert "no replica is ready yet" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_without_room_in_the_router_is_429_with_retry_after(
    client: TestClient, model: EchoModel, stream: bool
) -> None:
    model.fill()
    for path, body in (
        ("/v1/completions", {"model": "echo", "prompt": "a", "stream": stream}),
        ("/v1/chat/completions", CHAT | {"stream": stream}),
        ("/v2/models/echo/generate", {"text_input": "a"}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 429
        seconds = int(response.headers["Retry-After"])
        assert seconds >= 1
        assert f"64 requests wait already (queue.max_queued); try again in {seconds} s" in response.text
    assert not model.requests


def test_a_full_queue_is_429_with_retry_after(client: TestClient, model: EchoModel) -> None:
    model.error = QueueFullError("model echo: full", retry_after_s=3)
    for stream in (False, True):
        response = client.post("/v1/completions", json=BODY | {"stream": stream})
        assert response.status_code == 429
        assert response.headers["Retry-After"] == "3"


def test_an_error_of_the_replica_before_the_first_chunk_sets_the_status(client: TestClient, model: EchoModel) -> None:
    model.error = InvalidRequestError("prompt: 900 tokens, the context holds 512", "prompt")
    response = client.post("/v1/completions", json=BODY | {"stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_an_error_in_a_stream_is_an_event(client: TestClient, model: EchoModel) -> None:
    model.error, model.error_at = QueueFullError("gone"), 2
    response = client.post("/v1/completions", json=BODY | {"stream": True})
    assert response.status_code == 200
    chunks = events(response.text)
    assert chunks[-1]["error"]["message"] == "gone"
    assert len(chunks) == 3


def test_an_unforeseen_error_tells_nothing(client: TestClient, model: EchoModel) -> None:
    model.error = RuntimeError("secret path /etc")
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 500
    assert "secret" not in response.text


def test_models_health_and_readiness(client: TestClient) -> None:
    data = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["family"], card["engine"], card["ready"]) for card in data] == [
        ("echo", "llama", "bigdl", True),
        ("absent", "llama", "bigdl", False),
    ]
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["not_ready"]) == (503, ["absent"])


def test_unknown_paths_and_methods_are_openai_errors(client: TestClient) -> None:
    assert client.get("/v3").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/completions").status_code == 405


def test_openapi_has_the_body_s_schema(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CompletionRequest"}
    properties = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert properties["temperature"]["anyOf"][0]["maximum"] == 2
    assert properties["model"]["enum"] == ["echo", "absent"]


def test_token_ids_and_lists_of_prompts_become_choices_in_order(client: TestClient, model: EchoModel) -> None:
    body = client.post("/v1/completions", json=BODY | {"prompt": [5, 6]}).json()
    assert [choice["text"] for choice in body["choices"]] == ["t5 t6 "]
    body = client.post("/v1/completions", json=BODY | {"prompt": [[5], [6, 7]], "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == ["t5 ", "t5 ", "t6 t7 ", "t6 t7 "]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == USAGE | {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_choices_differ_in_their_seed_and_the_first_has_the_given_one(client: TestClient, model: EchoModel) -> None:
    client.post("/v1/completions", json=BODY | {"n": 3, "seed": 5})
    seeds = [request.sampling.seed for request in model.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_best_of_generates_more_than_it_gives(client: TestClient, model: EchoModel) -> None:
    body = client.post("/v1/completions", json=BODY | {"n": 2, "best_of": 4}).json()
    assert len(model.requests) == 4
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 16


def test_logprobs_are_openai_s_lists(client: TestClient) -> None:
    logprobs = client.post("/v1/completions", json=BODY | {"logprobs": 1}).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["to ", "be ", "or ", "not "],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"zero": -1.0}] * 4,
        "text_offset": [0, 3, 6, 9],
    }
    chunks = events(client.post("/v1/completions", json=BODY | {"logprobs": 1, "stream": True}).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {key: [item for part in parts for item in part[key]] for key in logprobs} == logprobs


def test_usage_ends_a_stream_where_it_was_asked_for(client: TestClient) -> None:
    body = BODY | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    chunks = events(client.post("/v1/completions", json=body).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE | {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    texts = ["", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["to be or not ", "to be or not "]


def test_tokenize_and_detokenize(client: TestClient) -> None:
    body = client.post("/v1/tokenize", json={"model": "echo", "prompt": "to be"}).json()
    assert body == {"tokens": [1, 2, 2], "count": 3, "max_model_len": 512}
    bare = {"model": "echo", "prompt": "to be", "add_special_tokens": False}
    assert client.post("/v1/tokenize", json=bare).json()["tokens"] == [2, 2]
    assert client.post("/v1/tokenize", json={"model": "echo", "messages": CHAT["messages"]}).json()["count"] == 3
    assert client.post("/v1/tokenize", json={"model": "echo"}).status_code == 400
    assert client.post("/v1/detokenize", json={"model": "echo", "tokens": [1, 2]}).json() == {"prompt": "x xx"}


def test_embeddings_as_numbers_and_as_base64(client: TestClient) -> None:
    body = {"model": "echo", "input": ["a b", "c"]}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [entry["embedding"] for entry in answer["data"]] == [[0.5, -1.0, 2.0], [0.5, -1.0, 1.0]]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    coded = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4").tolist() == [0.5, -1.0, 2.0]
    assert client.post("/v1/embeddings", json=body | {"input": "unembeddable"}).json()["error"]["param"] == "model"


def test_limits_of_the_operator(model: EchoModel) -> None:
    client = client_of(model, max_tokens=10, prompt_tokens=7, timeout_s=5, body_bytes=200)
    refused = client.post("/v1/completions", json=BODY | {"max_tokens": 11})
    assert refused.json()["error"]["message"] == "max_tokens: found 11, allowed are up to 10"
    client.post("/v1/chat/completions", json=CHAT)
    (request,) = model.requests
    assert (request.max_tokens, request.max_prompt_tokens, request.timeout_s) == (10, 7, 5)
    large = client.post("/v1/completions", json=BODY | {"prompt": "x" * 200})
    assert large.status_code == 413
    streamed = client.post("/v1/completions", content=iter([b"{", b" " * 200, b"}"]))
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (413, "request_too_large")


def test_a_request_that_waits_hears_comments(model: EchoModel) -> None:
    client = client_of(model, keep_alive_s=0.01)
    model.delay_s = 0.1
    response = client.post("/v1/completions", json=BODY | {"stream": True})
    assert response.text.startswith(": keep-alive\n\n")
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text)) == "to be or not "
    model.error = InvalidRequestError("prompt: too long", "prompt")
    late = client.post("/v1/completions", json=BODY | {"stream": True})
    assert (late.status_code, events(late.text)[-1]["error"]["param"]) == (200, "prompt")


def test_a_model_s_names_are_listed_as_vllm_lists_them() -> None:
    client = client_of(EchoModel("org/a", aliases=("b",)))
    for name in ("org/a", "b"):
        found = client.get(f"/v1/models/{name}").json()
        assert (found["id"], found["root"], found["parent"], found["max_model_len"]) == (name, "org/a", None, 512)
        answer = client.post("/v1/completions", json=BODY | {"model": name})
        assert (answer.status_code, answer.json()["model"]) == (200, name)
        assert found in client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/org").status_code == 404
    assert client.get("/v1/models/org%2Fa").json()["id"] == "org/a"


def test_embeddings_have_a_bound_of_their_own_and_the_model_s_width(model: EchoModel) -> None:
    client, body = client_of(model, choices=2, embeddings=100), {"model": "echo", "input": ["a"] * 100}
    assert len(client.post("/v1/embeddings", json=body).json()["data"]) == 100
    error = client.post("/v1/embeddings", json=body | {"input": ["a"] * 101}).json()["error"]
    assert error["message"] == "input: found 101, allowed are up to 100 (limits.embeddings)"
    assert LimitsConfig().embeddings == 2048
    error = client.post("/v1/embeddings", json=body | {"dimensions": 2}).json()["error"]
    assert error["message"] == "dimensions: found 2, allowed are null: an embedding has the model's own width"


def test_cached_tokens_are_told_of_each_prompt_once(client: TestClient, model: EchoModel) -> None:
    model.cached_tokens = 3
    for n in (1, 2):
        body = BODY | {"n": n}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (4, {"cached_tokens": 3})
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(client.post("/v1/completions", json=body | {"stream": True, "stream_options": options}).text)
        assert {chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks} == {3}


def test_a_session_s_name_reaches_the_router(client: TestClient, model: EchoModel) -> None:
    client.post("/v1/completions", json=BODY, headers={"X-Session-Id": "s"})
    client.post("/v1/chat/completions", json=CHAT | {"prompt_cache_key": "c"})
    client.post("/v1/responses", json={"model": "echo", "input": "hi", "prompt_cache_key": "r"})
    assert [request.session for request in model.requests] == ["/s", "/c", "/r"]
