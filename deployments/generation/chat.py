"""Conversations: the messages of a chat request, and how a model's template makes one text of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from jinja2 import TemplateError

from cluster.errors import InvalidRequestError
from cluster.families import FAMILIES, FamilyName, fitting_family
from cluster.families.family import Transcript
from cluster.model_config import ToolParser
from deployments.generation.tool_calls import DEFAULT, FORMS, form_of
from deployments.generation.tool_calls.reader import CallReader
from deployments.records import Conversation, Message, ToolCall

# What a template raises by raise_exception, and what it stumbles over.
_REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


TAKES_TOOLS = re.compile(r"\btools\b")


class ChatTemplate:
    """A tokenizer's own chat template, or its family's transcript.

    A template is code from the checkpoint: transformers runs it in Jinja's immutable sandbox, where it reaches neither
    Python's internals nor files. It could still loop without end or fill the memory: as the weights, it is the
    operator's choice. Special tokens that a message spells out become special tokens, as in a plain prompt.
    """

    def __init__(
        self,
        template: str | None,
        names: Mapping[str, str],
        config: dict[str, Any],
        tool_parser: ToolParser | None = None,
        tool_template: str | None = None,
    ) -> None:
        """`names` of the special tokens that the template may call; `config` is the model's config.json; `tool_parser`
        names the form of tool calls, where the template does not tell; `tool_template` is for conversations with tools,
        where it is another one."""
        self._names = dict(names)
        self._template = template
        self._tool_template = tool_template if tool_template is not None else template
        self._form = form_of(self._tool_template, tool_parser)
        self._transcript = FAMILIES[_family(config)].transcript
        if template is not None:
            _renderer()  # takes a second the first time, which no request should wait for

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings to stop at besides the request's own; none for a model that was taught to end its turns."""
        return self._transcript.stops if self._template is None else ()

    def tool_form(self, forced: bool) -> type[CallReader]:
        """As Tokenizer.tool_form has it."""
        if not forced and (self._tool_template is None or not TAKES_TOOLS.search(self._tool_template)):
            raise InvalidRequestError(
                "tools: this model's chat template takes none, so that it would not know of them; allowed are a"
                ' tool_choice "none", "required" or a named function',
                field="tools",
            )
        if not forced and self._form is None:
            raise InvalidRequestError(
                "tools: the form in which this model calls them cannot be told by its chat template; the operator can"
                f" name it (models[].tool_parser: {', '.join(FORMS)})",
                field="tools",
            )
        return self._form or DEFAULT

    def render(self, conversation: Conversation) -> str:
        """The text that the assistant's next message follows. Raises InvalidRequestError where the template does."""
        if self._template is None:
            return _plain_text(self._transcript, conversation)
        messages = [template_message(message) for message in conversation.messages]
        tools = [json.loads(tool.definition) for tool in conversation.tools]
        try:
            (text,), _ = _renderer()(
                [messages],
                tools=tools or None,
                chat_template=self._tool_template if tools else self._template,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                **{**self._names, **conversation.template_arguments},
            )
        except _REFUSALS as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {error}", field="messages"
            ) from error
        return str(text)

    def wrote_bos(self, text: str) -> bool:
        """Whether `text`, as rendered, begins with the BOS token, as templates that want one do by convention."""
        bos = self._names.get("bos_token", "")
        return self._template is not None and bool(bos) and text.startswith(bos)


def _plain_text(labels: Transcript, conversation: Conversation) -> str:
    """A line (or more) a message behind its role's label; the last line is the assistant's label where a message of its
    follows, without the space after it, which is a part of the next word's token."""
    of_role = {
        "system": labels.system,
        "user": labels.user,
        "assistant": labels.assistant,
        "tool": labels.user,
    }
    lines = [f"{of_role[message.role]} {_plain_content(message)}".lstrip(" ") for message in conversation.messages]
    return "\n".join([*lines, labels.assistant] if conversation.add_generation_prompt else lines)


def _plain_content(message: Message) -> str:
    """Tools' answers and the calls before them as Hermes' template writes them."""
    if message.role == "tool":
        return f"<tool_response>\n{message.content}\n</tool_response>"
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
        for call in message.tool_calls
    ]
    return "\n".join([message.content, *calls] if message.content or not calls else calls)


def template_message(message: Message) -> dict[str, Any]:
    """As templates take it: a call's arguments are an object, and what is not there has no key."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return result


def _arguments(call: ToolCall) -> Any:
    """As they are where they are no JSON: the model wrote them so."""
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def _renderer() -> Callable[..., Any]:
    """Jinja as transformers has it for templates: the sandbox, its filters and functions."""
    # transformers advises on import to install PyTorch, which a replica does without on purpose.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils.chat_template_utils import render_jinja_template

    return cast(Callable[..., Any], render_jinja_template)


def _family(config: dict[str, Any]) -> FamilyName:
    """As config.json tells; llama for what it leaves open, as that transcript suits any model."""
    return fitting_family(config.get("model_type"), config.get("architectures")) or "llama"
