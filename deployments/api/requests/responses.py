"""The body of POST /v1/responses, OpenAI's Responses API, and the chat completion that it asks for.

Nothing is stored between requests: the input is the whole conversation, as items.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body
from deployments.api.requests.formats import JsonObjectFormat, JsonSchemaFormat, NamedSchema, ResponseFormat
from deployments.api.requests.messages import ChatMessage
from deployments.api.requests.schema import MAX_TOP_LOGPROBS, SESSION, ChatRequest, Priority, SampledBody
from deployments.api.requests.tools import (
    MAX_TOOLS,
    AllowedTools,
    AllowedToolsChoice,
    CalledFunction,
    FunctionDefinition,
    FunctionName,
    FunctionReference,
    FunctionTool,
    MessageToolCall,
    NamedTool,
    ToolChoice,
)

LOGPROBS = "message.output_text.logprobs"

# What the fields of the chat completion are called here, for errors.
OWN_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


class InputText(Body):
    """Of a message; what the assistant said comes back as `output_text`."""

    place = "input part"

    type: Literal["input_text", "output_text"]
    text: str


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = str | list[Annotated[InputText | Refusal, Field(discriminator="type")]]


def text_of(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Body):
    place = "message item"

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(Body):
    """An earlier call by the model."""

    place = "function_call item"

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Body):
    """What the function of an earlier call gave."""

    place = "function_call_output item"

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(Body):
    """A model is not shown its earlier reasoning."""

    place = "reasoning item"

    type: Literal["reasoning"]


def item_tag(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"[{kind or 'message'}]"


# The tags are in brackets, which tells them from the names of fields in an error's location.
Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionCallOutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(
        item_tag,
        custom_error_type="item_type",
        custom_error_message="allowed are items of type message, function_call, function_call_output and reasoning;"
        " nothing is stored that an item_reference could name (send store: false to have the client send the item)",
    ),
]


def text_is_a_message(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "allowed are a string and a list of items")
    return value


class OutputTextFormat(Body):
    """Of type json_schema it needs a `schema`."""

    type: Literal["text", "json_object", "json_schema"]
    # `schema` is a method of pydantic's own.
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: str = "response"
    description: str | None = None
    strict: bool | None = None

    def response_format(self) -> ResponseFormat | None:
        """As a chat completion has it. Raises InvalidRequestError."""
        if self.type == "json_object":
            return JsonObjectFormat(type="json_object")
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise InvalidRequestError("text.format.schema: missing, but required", "text.format.schema")
        named = NamedSchema.model_validate({"schema": self.json_schema, "name": self.name})
        return JsonSchemaFormat(type="json_schema", json_schema=named)


class TextConfig(Body):
    place = "text"

    format: OutputTextFormat = OutputTextFormat(type="text")


class ReasoningConfig(Body):
    """`effort` is told to the chat template."""

    place = "reasoning"

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


def only_functions(kind: Any) -> Any:
    if kind != "function":
        raise PydanticCustomError(
            "tool_type", 'allowed is "function": the client runs the tools, there are none on the server'
        )
    return kind


class FlatFunctionTool(Body):
    """The fields of FunctionDefinition beside the type, which is looked at first."""

    type: Annotated[Literal["function"], BeforeValidator(only_functions)]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self) -> FunctionTool:
        """As a chat completion has it."""
        function = {name: getattr(self, name) for name in FunctionDefinition.model_fields}
        return FunctionTool(type="function", function=FunctionDefinition(**function))


class FlatNamedTool(Body):
    type: Literal["function"]
    name: str

    def nested(self) -> NamedTool:
        """As a chat completion has it."""
        return NamedTool(type="function", function=FunctionReference(name=self.name))


class FlatAllowedTools(Body):
    """`mode`: as a tool_choice, among these tools alone."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatNamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class ResponsesRequest(SampledBody):
    """The body of POST /v1/responses."""

    place = "responses"

    input: Annotated[list[Item], BeforeValidator(text_is_a_message, json_schema_input_type=str | list[Item])]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    tools: Annotated[list[FlatFunctionTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | FlatAllowedTools = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    include: list[
        Literal[
            "message.output_text.logprobs", "reasoning.encrypted_content", "message.input_image.image_url",
            "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
            "computer_call_output.output.image_url", "code_interpreter_call.outputs",
        ]
    ] = Field(default_factory=list, description=f"{LOGPROBS}; the others are of what no answer here has.")  # fmt: skip
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    metadata: dict[str, str] = Field(default_factory=dict, description="It stands in the answer again.")
    stream: bool = False
    prompt_cache_key: Annotated[str, Field(description=SESSION)] | None = None
    user: str | None = None
    priority: Priority = 0

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in self.include

    def check(self) -> None:
        check_calls(self.input)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(f'top_logprobs: allowed only with include: ["{LOGPROBS}"]', "top_logprobs")
        with own_names():
            self.chat.check()

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat completion that is asked for."""
        messages = chat_messages(self.input)
        if self.instructions is not None:
            messages.insert(0, ChatMessage(role="system", content=self.instructions))
        if not messages:
            raise InvalidRequestError("input: found no message, at least one is needed", "input")
        return ChatRequest(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            tools=[tool.nested() for tool in self.tools],
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.format.response_format(),
            reasoning_effort=self.reasoning.effort,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            stream=self.stream,
            prompt_cache_key=self.prompt_cache_key,
            user=self.user,
            priority=self.priority,
            **{name: getattr(self, name) for name in SampledBody.model_fields},
        )

    def _tool_choice(self) -> ToolChoice:
        choice = self.tool_choice
        if isinstance(choice, FlatNamedTool):
            return choice.nested()
        if isinstance(choice, FlatAllowedTools):
            allowed = AllowedTools(mode=choice.mode, tools=[tool.nested() for tool in choice.tools])
            return AllowedToolsChoice(type="allowed_tools", allowed_tools=allowed)
        return choice


def check_calls(items: Sequence[Item]) -> None:
    """Raises InvalidRequestError for an output whose call is not before it."""
    called = set()
    for index, item in enumerate(items):
        if isinstance(item, FunctionCallItem):
            called.add(item.call_id)
        elif isinstance(item, FunctionCallOutputItem) and item.call_id not in called:
            field = f"input[{index}].call_id"
            raise InvalidRequestError(
                f"{field}: found {item.call_id!r:.80}, but no function_call item before it has this call_id", field
            )


def chat_messages(items: Sequence[Item]) -> list[ChatMessage]:
    """A turn's calls belong to its message, as chat templates have it: a call to the assistant's message right before
    it, and the assistant's text behind a call to that message too."""
    messages: list[dict[str, Any]] = []
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        match item:
            case MessageItem(role="assistant") if last is not None and last.get("tool_calls"):
                last["content"] = (last["content"] or "") + text_of(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": text_of(item.content)})
            case FunctionCallItem():
                if last is None:
                    last = {"role": "assistant", "content": None}
                    messages.append(last)
                function = CalledFunction(name=item.name, arguments=item.arguments)
                last.setdefault("tool_calls", []).append(MessageToolCall(id=item.call_id, function=function))
            case FunctionCallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
    return [ChatMessage(**message) for message in messages]


@contextmanager
def own_names() -> Iterator[None]:
    """Errors about the chat completion name the fields of this API."""
    try:
        yield
    except InvalidRequestError as error:
        raise in_own_names(error) from error


def in_own_names(error: InvalidRequestError) -> InvalidRequestError:
    if error.field is None:
        return error
    name, place = re.fullmatch(r"(\w*)(.*)", error.field, re.DOTALL).groups()  # type: ignore[union-attr]
    # The chat's messages are others than the items.
    place = "" if name == "messages" else place.replace(".function", "", 1).replace(".allowed_tools", "", 1)
    field = OWN_NAMES.get(name, name) + place
    return InvalidRequestError(field + str(error).removeprefix(error.field), field)
