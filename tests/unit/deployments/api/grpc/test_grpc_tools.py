"""Tools over gRPC: the same records as HTTP's (test_http_tools.py), and calls as messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.records import Conversation, Message, ToolCall, ToolUse
from protos import inference_pb2 as pb
from tests.unit.deployments.api.grpc.test_grpc_api import INVALID
from tests.unit.deployments.api.http.test_http_tools import PARAMETERS, calling
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import Context, api_of, ask, stream

__all__ = ["calling"]

TOOLS = [pb.Tool(name="get_weather", description="Of a city", parameters=json.dumps(PARAMETERS)), pb.Tool(name="now")]


def chat(*messages: pb.ChatMessage, tools: list[pb.Tool] = TOOLS) -> pb.Chat:
    return pb.Chat(messages=messages or [pb.ChatMessage(role="user", content="hi")], tools=tools)


async def test_calls_whole_and_streamed(calling: EchoModel) -> None:
    answer = await api_of(calling).Generate(ask(chat=chat()), Context())
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("Well.", "tool_calls")
    weather = pb.ToolCall(index=0, id="a1b2c3d4e", name="get_weather", arguments='{"city": "Paris"}')
    now = pb.ToolCall(index=1, id="f1f2f3f4f", name="now", arguments="{}")
    assert list(choice.tool_calls) == [weather, now]
    choices = [message.choice for message in await stream(api_of(calling), ask(chat=chat()))]
    assert "".join(choice.text for choice in choices) == "Well."
    pieces = [(call.index, call.name, call.arguments) for choice in choices for call in choice.tool_calls]
    assert pieces == [(0, "get_weather", ""), (0, "", '{"city": '), (0, "", '"Paris"}'), (1, "now", "{}")]
    assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, ToolUse(("get_weather", "now"))),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ToolUse(("get_weather", "now"), True, False)),
        ({"tool_function": "now"}, ToolUse(("now",), forced=True, parallel=False)),
        ({"allowed_tools": ["now"]}, ToolUse(("now",))),
        ({"allowed_tools": ["now"], "tool_choice": "required"}, ToolUse(("now",), forced=True)),
        ({"tool_choice": "none"}, None),
    ],
)
async def test_what_may_be_called(model: EchoModel, fields: dict[str, Any], use: ToolUse | None) -> None:
    await api_of(model).Generate(ask(chat=chat(), **fields), Context())
    assert model.requests[0].tool_use == use


async def test_calls_and_answers_of_earlier_turns(model: EchoModel) -> None:
    called = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="1", name="now", arguments="{}")])
    answer = pb.ChatMessage(role="tool", content="noon", tool_call_id="1")
    await api_of(model).Generate(ask(chat=chat(called, answer)), Context())
    conversation = model.requests[0].prompt
    assert isinstance(conversation, Conversation)
    assert conversation.messages == (
        Message("assistant", "", tool_calls=(ToolCall("1", "now", "{}"),)),
        Message("tool", "noon", name="now", tool_call_id="1"),
    )


async def test_one_tool_and_allowed_ones_are_not_named_together(model: EchoModel) -> None:
    context = Context()
    await api_of(model).Generate(ask(chat=chat(), tool_function="now", allowed_tools=["now"]), context)
    assert (context.code, context.details) == (INVALID, "allowed_tools: not together with tool_function")


async def test_parameters_that_are_no_json_are_named(model: EchoModel) -> None:
    context = Context()
    await api_of(model).Generate(ask(chat=chat(tools=[pb.Tool(name="f", parameters="{")])), context)
    assert context.code == INVALID
    assert context.details.startswith("tools[0].function.parameters: not valid JSON")
