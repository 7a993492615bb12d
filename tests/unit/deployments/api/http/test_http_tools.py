"""Tools in chat completions over HTTP: what reaches the replica, and what a message with calls becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.records import (
    Conversation,
    FinishReason,
    GenerationChunk,
    Message,
    MessagePiece,
    ToolCall,
    ToolCallPiece,
    ToolUse,
)
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import CHAT, events

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "strict": None}},
]
NAMED = {"type": "function", "function": {"name": "now"}}
# A message of content, a call in pieces and another one.
PIECES = [
    MessagePiece("Well.", ()),
    MessagePiece("", ()),  # text that may be a call
    MessagePiece("", (ToolCallPiece(0, "", "a1b2c3d4e", "get_weather"), ToolCallPiece(0, '{"city": '))),
    MessagePiece("", (ToolCallPiece(0, '"Paris"}'), ToolCallPiece(1, "{}", "f1f2f3f4f", "now"))),
]


@pytest.fixture
def calling(model: EchoModel) -> EchoModel:
    """The echo, but its answers call tools."""
    reasons: list[FinishReason | None] = [None] * (len(PIECES) - 1) + ["tool_calls"]
    model.answer = [
        GenerationChunk("raw", (index,), reason, 3, index + 1, message=piece)
        for index, (piece, reason) in enumerate(zip(PIECES, reasons, strict=True))
    ]
    return model


def test_a_message_with_calls_is_openai_s_object(client: TestClient, calling: EchoModel) -> None:
    (choice,) = client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS}).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Well.",
        "tool_calls": [
            {
                "id": "a1b2c3d4e",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            },
            {"id": "f1f2f3f4f", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


def test_calls_are_streamed_with_their_name_first(client: TestClient, calling: EchoModel) -> None:
    chunks = events(client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS, "stream": True}).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Well."},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "a1b2c3d4e",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "f1f2f3f4f", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            ]
        },
        {},
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "use"),
    [
        (allowed("auto", "now"), ToolUse(("now",))),
        (allowed("required", "now"), ToolUse(("now",), forced=True)),
        (allowed("required", "now", "get_weather"), ToolUse(("get_weather", "now"), forced=True)),
    ],
)
def test_allowed_tools_are_all_that_the_model_is_told_of(
    client: TestClient, model: EchoModel, choice: dict[str, Any], use: ToolUse
) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS, "tool_choice": choice})
    assert answer.status_code == 200, answer.text
    (request,) = model.requests
    assert request.tool_use == use
    assert isinstance(request.prompt, Conversation)
    assert tuple(tool.name for tool in request.prompt.tools) == use.names


@pytest.mark.parametrize(
    ("change", "use"),
    [
        ({}, ToolUse(("get_weather", "now"))),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolUse(("get_weather", "now"), parallel=False)),
        ({"tool_choice": "required"}, ToolUse(("get_weather", "now"), forced=True)),
        ({"tool_choice": NAMED}, ToolUse(("now",), forced=True, parallel=False)),
        ({"tool_choice": "none"}, None),
        ({"tools": [], "tool_choice": "auto"}, None),
        ({"tools": None, "tool_choice": None, "parallel_tool_calls": None}, None),
    ],
)
def test_what_may_be_called(client: TestClient, model: EchoModel, change: dict[str, Any], use: ToolUse | None) -> None:
    assert client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS} | change).status_code == 200
    (request,) = model.requests
    assert request.tool_use == use
    assert isinstance(request.prompt, Conversation)
    assert [tool.name for tool in request.prompt.tools] == ([] if use is None else ["get_weather", "now"])


def test_the_model_is_told_of_tools_as_they_were_sent(client: TestClient, model: EchoModel) -> None:
    client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS})
    conversation = model.requests[0].prompt
    assert isinstance(conversation, Conversation)
    weather, now = conversation.tools
    assert json.loads(weather.definition) == TOOLS[0]
    assert json.loads(weather.parameters) == PARAMETERS
    nothing = {"type": "object", "properties": {}}
    assert json.loads(now.definition) == {"type": "function", "function": {"name": "now", "parameters": nothing}}


def test_calls_and_answers_of_earlier_turns_are_taken(client: TestClient, calling: EchoModel) -> None:
    """As the openai package's `answer.model_dump()` has them, and as a stream leaves them."""
    asked = CHAT["messages"]
    body = CHAT | {"tools": TOOLS}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    message["tool_calls"][1]["index"] = 1
    answer = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": [{"type": "text", "text": "hot"}]}
    response = client.post("/v1/chat/completions", json=body | {"messages": [*asked, message, answer]})
    assert response.status_code == 200
    conversation = calling.requests[1].prompt
    assert isinstance(conversation, Conversation)
    calls = (ToolCall("a1b2c3d4e", "get_weather", '{"city": "Paris"}'), ToolCall("f1f2f3f4f", "now", "{}"))
    assert conversation.messages[-2:] == (
        Message("assistant", "Well.", tool_calls=calls),
        Message("tool", "hot", name="get_weather", tool_call_id="a1b2c3d4e"),
    )


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name", "get_weather"),
        ({"tool_choice": "any"}, "tool_choice", "allowed are none, auto, required, {type: function"),
        ({"tool_choice": allowed("none", "now")}, "tool_choice", "mode: auto or required"),
        ({"tool_choice": allowed("auto")}, "tool_choice", "tools: a list of such"),
        (
            {"tool_choice": allowed("auto", "now", "f")},
            "tool_choice.allowed_tools.tools[1].function.name",
            "allowed are get_weather, now",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "twice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
            "found 'array'",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not together with tools"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "forces a call"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "tool_calls": [{"id": "1", "function": NAMED["function"]}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "missing",
        ),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, change: dict[str, Any], field: str, words: str) -> None:
    error = client.post("/v1/chat/completions", json=CHAT | {"tools": TOOLS} | change).json()["error"]
    assert error["param"] == field
    assert words in error["message"]
