"""A chat's messages and tools as those of protos/inference.proto, and the calls of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.errors import InvalidRequestError
from deployments.client.messages import Messages
from deployments.records import ToolCallPiece
from protos import inference_pb2 as pb

# Of a message; what else OpenAI's have is empty in a model's answer.
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id")


def with_field(name: str, make: Callable[[], Any]) -> Any:
    """Raises InvalidRequestError, naming the field, for a value that the message cannot hold."""
    try:
        return make()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidRequestError(f"{name}: cannot be sent over gRPC: {error}", name) from None


def conversation(messages: Messages) -> Any:
    """As the HTTP API has it: content may be parts of text, and `developer` is another word for system."""
    written = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if further := sorted(key for key in message if key not in MESSAGE_FIELDS and message[key] is not None):
            raise InvalidRequestError(f"{name}.{further[0]}: not supported over gRPC", f"{name}.{further[0]}")
        written.append(with_field(name, partial(chat_message, message)))
    return pb.Chat(messages=written)


def chat_message(message: Mapping[str, Any]) -> Any:
    role, calls = message["role"], message.get("tool_calls") or ()
    content = message.get("content") if role == "assistant" else message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return pb.ChatMessage(
        role="system" if role == "developer" else role,
        content=text,
        tool_calls=[
            pb.ToolCall(
                index=index, id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"]
            )
            for index, call in enumerate(calls)
        ],
        tool_call_id=message.get("tool_call_id"),
    )


def put_tools(request: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are left."""
    given = dict(options)
    for index, tool in enumerate(given.pop("tools", None) or ()):
        request.chat.tools.append(with_field(f"tools[{index}]", partial(tool_message, tool)))
    choice = given.pop("tool_choice", None)
    if choice is not None:
        with_field("tool_choice", lambda: put_choice(request, choice))
    return given


def tool_message(tool: Mapping[str, Any]) -> Any:
    if tool["type"] != "function":
        raise ValueError(f"found type {tool['type']!r}, allowed is function")
    function = tool["function"]
    parameters = function.get("parameters")
    return pb.Tool(
        name=function["name"],
        description=function.get("description"),
        parameters=None if parameters is None else json.dumps(parameters, allow_nan=False),
    )


def put_choice(request: Any, choice: Any) -> None:
    if isinstance(choice, str):
        request.tool_choice = choice
    elif choice.get("type") == "allowed_tools":
        allowed = choice["allowed_tools"]
        request.tool_choice = allowed["mode"]
        request.allowed_tools.extend(tool["function"]["name"] for tool in allowed["tools"])
    else:
        request.tool_function = choice["function"]["name"]


def tool_calls(choice: Any) -> tuple[ToolCallPiece, ...]:
    return tuple(
        ToolCallPiece(call.index, call.arguments, call.id or None, call.name or None) for call in choice.tool_calls
    )
