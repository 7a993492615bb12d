"""The client with tools, over both protocols: what is sent, the calls that come back, and the next turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deployments.client import NibbleClient
from deployments.client.messages import Choice
from deployments.records import Conversation, Message, ToolCall, ToolCallPiece
from protos import inference_pb2 as pb
from tests.unit.deployments.api.http.test_http_tools import PARAMETERS, PIECES, TOOLS, calling
from tests.unit.deployments.client.test_client import assert_refused_unsent, grpc_url, http_url, servicer, url
from tests.unit.echo_servicer import Servicer
from tests.unit.fakes import EchoModel

__all__ = ["calling", "grpc_url", "http_url", "servicer", "url"]

ASKED = [{"role": "user", "content": "hi"}]
CALLS = (
    ToolCallPiece(0, '{"city": "Paris"}', "a1b2c3d4e", "get_weather"),
    ToolCallPiece(1, "{}", "f1f2f3f4f", "now"),
)
MESSAGE = {
    "role": "assistant",
    "content": "Well.",
    "tool_calls": [
        {"id": "a1b2c3d4e", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "f1f2f3f4f", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
}
NEXT = [*ASKED, MESSAGE, {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "hot"}]


@pytest.fixture(autouse=True)
def answers(calling: EchoModel, servicer: Servicer) -> None:
    """Both servers' are the same calls."""
    for index, piece in enumerate(PIECES):
        calls = [
            pb.ToolCall(index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments)
            for call in piece.tool_calls
        ]
        last = "tool_calls" if index == len(PIECES) - 1 else None
        servicer.answer.append(pb.Choice(text=piece.content, tool_calls=calls, finish_reason=last))


def test_calls_whole_and_streamed(url: str) -> None:
    with NibbleClient(url) as client:
        (choice,) = client.chat("echo", ASKED, tools=TOOLS).choices
        pieces = list(client.stream_chat("echo", ASKED, tools=TOOLS))
    assert (choice.text, choice.finish_reason, choice.tool_calls) == ("Well.", "tool_calls", CALLS)
    assert choice.message == MESSAGE
    assert "".join(piece.text for piece in pieces) == "Well."
    assert [call for piece in pieces for call in piece.tool_calls] == [
        ToolCallPiece(0, "", "a1b2c3d4e", "get_weather"),
        ToolCallPiece(0, '{"city": '),
        ToolCallPiece(0, '"Paris"}'),
        ToolCallPiece(1, "{}", "f1f2f3f4f", "now"),
    ]
    assert pieces[-1].finish_reason == "tool_calls"


def test_the_next_turn_over_http(http_url: str, model: EchoModel) -> None:
    with NibbleClient(http_url) as client:
        client.chat("echo", NEXT, tools=TOOLS, tool_choice="none")
    conversation = model.requests[0].prompt
    assert isinstance(conversation, Conversation)
    calls = (ToolCall("a1b2c3d4e", "get_weather", '{"city": "Paris"}'), ToolCall("f1f2f3f4f", "now", "{}"))
    assert conversation.messages[1:] == (
        Message("assistant", "Well.", tool_calls=calls),
        Message("tool", "hot", name="get_weather", tool_call_id="a1b2c3d4e"),
    )


def test_the_next_turn_over_grpc(grpc_url: str, servicer: Servicer) -> None:
    with NibbleClient(grpc_url) as client:
        client.chat("echo", NEXT, tools=TOOLS, tool_choice="none", parallel_tool_calls=False)
        client.chat("echo", ASKED, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
        client.chat("echo", ASKED, tools=None, tool_choice=None)
        client.chat("echo", ASKED, tools=TOOLS, tool_choice=ALLOWED)
    first, named, without, allowed = servicer.requests
    assert (allowed.tool_choice, list(allowed.allowed_tools)) == ("required", ["now"])
    weather, now = first.chat.tools
    assert (weather.name, weather.description, json.loads(weather.parameters)) == (
        "get_weather",
        "Of a city",
        PARAMETERS,
    )
    assert now == pb.Tool(name="now")
    assert (first.tool_choice, first.parallel_tool_calls) == ("none", False)
    assert (named.WhichOneof("tool_use"), named.tool_function) == ("tool_function", "now")
    assert (without.WhichOneof("tool_use"), len(without.chat.tools)) == (None, 0)
    _, assistant, tool = first.chat.messages
    calls = [(call.index, call.id, call.name, call.arguments) for call in assistant.tool_calls]
    assert calls == [(0, "a1b2c3d4e", "get_weather", '{"city": "Paris"}'), (1, "f1f2f3f4f", "now", "{}")]
    assert (tool.content, tool.tool_call_id) == ("hot", "a1b2c3d4e")


def test_a_message_of_calls_alone_has_no_content(grpc_url: str, servicer: Servicer) -> None:
    message = Choice(0, "", "tool_calls", tool_calls=CALLS[1:]).message
    assert message["content"] is None
    assert Choice(0, "Well.", "stop").message == {"role": "assistant", "content": "Well."}
    with NibbleClient(grpc_url) as client:
        client.chat("echo", [*ASKED, message, *ASKED])
    assert servicer.requests[0].chat.messages[1].content == ""


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda client: client.chat("echo", ASKED, tools=[{"type": "web_search"}]), "tools[0]"),
        (lambda client: client.chat("echo", ASKED, tools=[TOOLS[0], {"type": "function"}]), "tools[1]"),
        (lambda client: client.chat("echo", ASKED, tool_choice={"type": "any"}), "tool_choice"),
        (lambda client: client.chat("echo", [{"role": "assistant", "tool_calls": [{"id": "x"}]}]), "messages[0]"),
        (lambda client: client.complete("echo", "a", tools=TOOLS), "tools"),
    ],
)
def test_what_grpc_cannot_hold_is_refused_by_its_name(
    grpc_url: str, servicer: Servicer, ask: Callable[[NibbleClient], Any], field: str
) -> None:
    assert_refused_unsent(grpc_url, servicer, ask, field)


def test_a_url_may_end_in_v1_as_openai_s_clients_have_it(http_url: str) -> None:
    for written in (f"{http_url}/v1", f"{http_url}/v1/"):
        with NibbleClient(written) as client:
            assert [model.id for model in client.models()] == ["echo", "absent"]
