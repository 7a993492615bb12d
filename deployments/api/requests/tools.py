"""The functions that a chat's model may call, as OpenAI's clients send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body
from deployments.records import ToolCall, ToolUse

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class FunctionDefinition(Body):
    """`parameters`: the JSON schema of an object; without it the function takes none. `strict` changes nothing: the
    arguments of a forced call follow the schema, and those of others are the model's."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Body):
    """`mode`: as a tool_choice, among these tools alone."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]

    @property
    def names(self) -> set[str]:
        return {tool.function.name for tool in self.tools}


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class CalledFunction(Body):
    name: str
    arguments: str


class MessageToolCall(Body):
    """Of an earlier message of the assistant; `index` is left from a stream."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


def check_tools(tools: list[FunctionTool]) -> None:
    """Raises InvalidRequestError."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        field, function = f"tools[{index}].function", tool.function
        if function.name in names:
            raise InvalidRequestError(
                f"{field}.name: found {function.name!r} twice; names must differ", f"{field}.name"
            )
        names.add(function.name)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            field = f"{field}.parameters.type"
            raise InvalidRequestError(f'{field}: found {kind!r:.80}, allowed is "object"', field)


def tool_use(tools: list[FunctionTool], choice: ToolChoice, parallel: bool) -> ToolUse | None:
    """None where no tool may be called. Raises InvalidRequestError for a choice that the tools do not have."""
    names = tuple(tool.function.name for tool in tools)
    if isinstance(choice, NamedTool):
        check_known(choice, names, "tool_choice")
        return ToolUse((choice.function.name,), forced=True, parallel=False)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        for index, tool in enumerate(allowed.tools):
            check_known(tool, names, f"tool_choice.allowed_tools.tools[{index}]")
        names, choice = tuple(name for name in names if name in allowed.names), allowed.mode
    if choice == "required" and not names:
        raise InvalidRequestError('tool_choice: found "required", but there are no tools; send some', "tool_choice")
    return ToolUse(names, choice == "required", parallel) if names and choice != "none" else None


def check_known(tool: NamedTool, names: Sequence[str], where: str) -> None:
    if tool.function.name not in names:
        field = f"{where}.function.name"
        allowed = ", ".join(names) or "none: there are no tools"
        raise InvalidRequestError(f"{field}: found {tool.function.name!r:.80}, allowed are {allowed}", field)
