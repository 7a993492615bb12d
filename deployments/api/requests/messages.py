"""The messages of a chat, as OpenAI's and vLLM's clients send them, and what its template is told."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body
from deployments.api.requests.tools import MessageToolCall, Tools, check_tools
from deployments.records import Conversation, Message, Tool

# What a template has from elsewhere.
RESERVED = frozenset(
    {
        "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "return_assistant_tokens_mask", "bos_token", "eos_token", "unk_token", "pad_token",
    }
)  # fmt: skip


class TextPart(Body):
    place = "content[]"

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """An assistant's message may be without content, as OpenAI's answers are that were refused."""

    place = "messages[]"

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[MessageToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    @property
    def without_content(self) -> bool:
        return self.content is None or self.content == []

    def message(self, called: dict[str, str] | None = None) -> Message:
        """`called`: names of functions, by the ids of earlier calls."""
        parts = [] if self.content is None else self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        if self.without_content and self.refusal is not None:
            text = self.refusal
        return Message(
            "system" if self.role == "developer" else self.role,
            text,
            self.name or (called or {}).get(self.tool_call_id or ""),
            tuple(call.call() for call in self.tool_calls),
            self.tool_call_id,
        )


class ConversationBody(Body):
    """What the chat template makes a prompt of. `add_special_tokens` null: where the template writes none itself."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_special_tokens: bool | None = None
    tools: Tools = Field(default_factory=list)

    def check_conversation(self, messages: list[ChatMessage]) -> None:
        """Raises InvalidRequestError for fields that do not go together."""
        for index, message in enumerate(messages):
            if message.role != "assistant" and message.without_content:
                field = f"messages[{index}].content"
                raise InvalidRequestError(f"{field}: missing, but required", field)
            if message.role != "assistant" and message.tool_calls:
                field = f"messages[{index}].tool_calls"
                raise InvalidRequestError(f"{field}: only the assistant calls tools; leave it out", field)
        check_tools(self.tools)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message: allowed only with add_generation_prompt: false", "continue_final_message"
            )
        reserved = sorted(RESERVED & set(self.chat_template_kwargs))
        if reserved:
            field = f"chat_template_kwargs.{reserved[0]}"
            raise InvalidRequestError(f"{field}: the template has it from elsewhere; leave it out", field)

    def conversation(self, messages: list[ChatMessage], **arguments: Any) -> Conversation:
        """`arguments`: further ones of the template; those of `chat_template_kwargs` come before them."""
        called = {call.id: call.function.name for message in messages for call in message.tool_calls}
        return Conversation(
            tuple(message.message(called) for message in messages),
            self.add_generation_prompt,
            self.continue_final_message,
            {**arguments, **self.chat_template_kwargs},
            self.add_special_tokens,
            self.told_tools(),
        )

    def told_tools(self) -> tuple[Tool, ...]:
        """Those that the model is told of."""
        tools = []
        for tool in self.tools:
            parameters = tool.function.parameters or {}
            function = tool.function.model_dump(exclude_none=True)
            function["parameters"] = parameters or {"type": "object", "properties": {}}
            definition = {"type": "function", "function": function}
            tools.append(Tool(tool.function.name, json.dumps(definition), json.dumps(parameters)))
        return tuple(tools)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]
