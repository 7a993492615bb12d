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
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "found 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "found 5; allowed are a string or a"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "parts"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"functions": [{"name": "f"}]}, "functions", "allowed are null: use `tools`"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, "messages[0].audio", "messages are text"),
        ({"messages": [{"role": "user", "content": "a", "nam": "x"}]}, "messages[0].nam", "not supported"),
        ({"continue_final_message": True}, "continue_final_message", "only with add_generation_prompt: false"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "from elsewhere"),
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


def test_an_assistant_message_goes_back_as_openai_s_package_dumps_it(client: TestClient, model: EchoModel) -> None:
    """`messages.append(answer.choices[0].message.model_dump())`, and what other clients add."""
    dumped = {
        "content": "b", "refusal": None, "role": "assistant", "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    older = {"role": "assistant", "content": None, "tool_calls": [], "refusal": "I will not.", "annotations": []}
    reasoned = {"role": "assistant", "content": "c", "reasoning_content": "thoughts", "of_next_year": None, "name": "x"}
    part = {"type": "text", "text": "d", "cache_control": {"type": "ephemeral"}}
    asked = {"role": "user", "content": [part], "name": "bob"}
    messages = [{"role": "user", "content": "a"}, dumped, older, reasoned, asked]
    answer = client.post("/v1/chat/completions", json={"model": "echo", "max_tokens": 2, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert [(each.role, each.content, each.name) for each in model.requests[0].prompt.messages] == [
        ("user", "a", None),
        ("assistant", "b", None),
        ("assistant", "I will not.", None),
        ("assistant", "c", "x"),
        ("user", "d", "bob"),
    ]


def test_what_the_template_is_told_reaches_the_replica(client: TestClient, model: EchoModel) -> None:
    fields = {
        "add_generation_prompt": False, "continue_final_message": True, "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False, "empty": None}, "add_special_tokens": True,
        "truncate_prompt_tokens": -1, "skip_special_tokens": False,
    }  # fmt: skip
    assert client.post("/v1/chat/completions", json=CHAT | fields).status_code == 200
    (request,) = model.requests
    prompt = request.prompt
    assert (prompt.add_generation_prompt, prompt.continue_final_message, prompt.add_special_tokens) == (
        False,
        True,
        True,
    )
    assert prompt.template_arguments == {"reasoning_effort": "low", "enable_thinking": False, "empty": None}
    assert (request.truncate_prompt_tokens, request.skip_special_tokens) == (-1, False)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_each_chunk_has_the_usage_of_its_choice_so_far(client: TestClient, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    body = CHAT if "chat" in path else {"model": "echo", "prompt": "hi you"}
    chunks = events(client.post(path, json=body | {"stream": True, "stream_options": options}).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2}
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    plain = events(client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    assert [chunk["usage"] for chunk in plain[:-1]] == [None] * (len(plain) - 1)


def test_token_ids_come_where_they_are_asked_for(client: TestClient) -> None:
    fields = {"return_token_ids": True}
    whole = client.post("/v1/chat/completions", json=CHAT | fields).json()
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == ([0, 1], [0, 1])
    chunks = events(client.post("/v1/chat/completions", json=CHAT | fields | {"stream": True}).text)
    assert chunks[0]["prompt_token_ids"] == [0, 1]
    assert [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", [])] == [0, 1]
    text = {"model": "echo", "prompt": ["a b", "c"]}
    choices = client.post("/v1/completions", json=text | fields).json()["choices"]
    assert [(choice["prompt_token_ids"], choice["token_ids"]) for choice in choices] == [([0, 1], [0, 1]), ([0], [0])]
    streamed = events(client.post("/v1/completions", json=text | fields | {"stream": True}).text)
    first = [chunk["choices"][0] for chunk in streamed if "prompt_token_ids" in chunk["choices"][0]]
    assert sorted(choice["prompt_token_ids"] for choice in first) == [[0], [0, 1]]
    assert "token_ids" not in client.post("/v1/completions", json=text).json()["choices"][0]


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
