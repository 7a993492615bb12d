"""Chat completions over HTTP, with a router of echoes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import CHAT, events


def test_a_chat_completion_is_openai_s_object(client: TestClient, model: EchoModel) -> None:
    body = client.post("/v1/chat/completions", json=CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi you "},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert model.requests[0].max_tokens is None


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(client: TestClient) -> None:
    chunks = events(client.post("/v1/chat/completions", json=CHAT | {"stream": True, "logprobs": True}).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "hi you "
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert [token["token"] for token in tokens] == ["hi ", "you "]
    assert tokens[0] == {"token": "hi ", "logprob": -0.5, "bytes": [104, 105, 32], "top_logprobs": []}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "found 'tool'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "found 5; allowed are a string or a"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "parts"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported by this server; leave it out"),
        ({"tool_choice": "auto"}, "tool_choice", "not supported by this server"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
        ({"prompt": "x"}, "prompt", "not supported; allowed are model"),
    ],
)
def test_a_wrong_chat_field_is_named(client: TestClient, change: dict[str, Any], field: str, words: str) -> None:
    error = client.post("/v1/chat/completions", json=CHAT | change).json()["error"]
    assert error["param"] == field
    assert words in error["message"]


def test_content_in_parts_and_null_fields_are_taken(client: TestClient, model: EchoModel) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    message = {"role": "developer", "content": parts, "refusal": None, "tool_calls": None}
    assert client.post("/v1/chat/completions", json=CHAT | {"messages": [message], "tools": None}).status_code == 200
    (sent,) = model.requests[0].prompt.messages
    assert (sent.role, sent.content) == ("system", "a b")


def test_formats_become_grammars(client: TestClient, model: EchoModel) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    formats = ({"response_format": named}, {"response_format": {"type": "json_object"}}, {"grammar": "start: /a/"})
    for fields in (*formats, {"response_format": {"type": "text"}}):
        assert client.post("/v1/chat/completions", json=CHAT | fields).status_code == 200
    grammars = [request.grammar for request in model.requests]
    assert [(g.kind, g.field) if g else None for g in grammars] == [
        ("json_schema", "response_format"),
        ("json_schema", "response_format"),
        ("grammar", "grammar"),
        None,
    ]
    assert json.loads(grammars[0].text) == schema
