"""The input of a response as the chat completion that it asks for."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError
from deployments.api.requests.parsing import parse
from deployments.api.requests.responses import ResponsesRequest, in_own_names
from deployments.records import Conversation, GenerationRequest, Grammar, Message, ToolCall, ToolUse

BODY = {"model": "m", "input": "hi"}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "done"}
TOOL = {"type": "function", "name": "f", "description": "Of a", "parameters": {"type": "object"}, "strict": True}
ALLOWED = {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]}


def record(change: dict[str, Any]) -> GenerationRequest:
    (found,) = parse(ResponsesRequest, BODY | change).chat.completions("id", LimitsConfig())
    return found


def messages(change: dict[str, Any]) -> tuple[Message, ...]:
    prompt = record(change).prompt
    assert isinstance(prompt, Conversation)
    return prompt.messages


def refused(change: dict[str, Any]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        parse(ResponsesRequest, BODY | change)
    return error.value


def test_text_is_a_message_of_the_user_and_instructions_come_first() -> None:
    assert messages({}) == (Message("user", "hi"),)
    assert messages({"instructions": "Be kind."}) == (Message("system", "Be kind."), Message("user", "hi"))


def test_messages_with_and_without_a_type_and_with_parts() -> None:
    said = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": None}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("hi", " you")]},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "phase": None,
            "content": [said],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"role": "user", "content": "more"},
    ]
    assert messages({"input": items}) == (
        Message("system", "Be kind."),
        Message("user", "hi you"),
        Message("assistant", "Hello"),
        Message("assistant", "No."),
        Message("user", "more"),
    )


def test_a_turn_s_calls_are_of_its_message() -> None:
    """As the openai package's `item.model_dump()` has them."""
    call = CALL | {"id": "fc_1", "status": "completed", "caller": None, "namespace": None, "parsed_arguments": {"a": 1}}
    second = CALL | {"call_id": "c2", "name": "g"}
    said = {"type": "message", "role": "assistant", "content": "Well."}
    parts = [{"type": "input_text", "text": "do"}, {"type": "input_text", "text": "ne"}]
    calls = (ToolCall("c1", "f", '{"a": 1}'), ToolCall("c2", "g", '{"a": 1}'))
    answers = [OUTPUT | {"output": parts}, OUTPUT | {"call_id": "c2"}]
    told = (
        Message("tool", "done", name="f", tool_call_id="c1"),
        Message("tool", "done", name="g", tool_call_id="c2"),
    )
    behind = {"role": "assistant", "content": "So."}
    for turn, content in (
        ([said, call, second], "Well."),
        ([call, second], ""),
        ([call, second, behind], "So."),
        ([said, call, behind, second], "Well.So."),
    ):
        assert messages({"input": [USER, *turn, *answers]}) == (
            Message("user", "hi"),
            Message("assistant", content, tool_calls=calls),
            *told,
        )
    # The next turn is another message.
    assert messages({"input": [USER, call, OUTPUT, behind]})[-1] == Message("assistant", "So.")


def test_what_is_sampled_and_where_it_ends() -> None:
    change = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "stop": "x", "max_output_tokens": 20}
    found = record(change | {"ignore_eos": True, "include": ["message.output_text.logprobs"], "top_logprobs": 2})
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.top_k) == (0.5, 0.9, 3)
    assert (found.sampling.seed, found.stop, found.max_tokens, found.ignore_eos) == (7, ("x",), 20, True)
    assert found.logprobs == 2
    assert record({"include": ["reasoning.encrypted_content"]}).logprobs is None


def test_the_template_is_told_of_the_effort() -> None:
    prompt = record({"reasoning": {"effort": "low", "summary": "auto"}}).prompt
    assert isinstance(prompt, Conversation)
    assert prompt.template_arguments == {"reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_schema", '{"type":"object"}', "response_format")),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "array"}, "strict": True, "description": None},
            Grammar("json_schema", '{"type": "array"}', "response_format"),
        ),
    ],
)
def test_formats(form: dict[str, Any], grammar: Grammar | None) -> None:
    assert record({"text": {"format": form, "verbosity": "medium"}}).grammar == grammar


@pytest.mark.parametrize(
    ("change", "use"),
    [
        ({}, ToolUse(("f",))),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolUse(("f",), parallel=False)),
        ({"tool_choice": "required"}, ToolUse(("f",), forced=True)),
        ({"tool_choice": {"type": "function", "name": "f"}}, ToolUse(("f",), forced=True, parallel=False)),
        ({"tool_choice": ALLOWED | {"mode": "auto"}}, ToolUse(("f",))),
        ({"tool_choice": ALLOWED | {"mode": "required"}}, ToolUse(("f",), forced=True)),
        ({"tool_choice": "none"}, None),
    ],
)
def test_what_may_be_called(change: dict[str, Any], use: ToolUse | None) -> None:
    found = record({"tools": [TOOL]} | change)
    assert found.tool_use == use
    assert isinstance(found.prompt, Conversation)
    assert [tool.name for tool in found.prompt.tools] == ([] if use is None else ["f"])


def test_allowed_tools_are_all_that_the_model_is_told_of() -> None:
    found = record({"tools": [TOOL | {"name": "g"}, TOOL], "tool_choice": ALLOWED | {"mode": "auto"}})
    assert found.tool_use == ToolUse(("f",))
    assert isinstance(found.prompt, Conversation)
    assert [tool.name for tool in found.prompt.tools] == ["f"]


@pytest.mark.parametrize(("change", "batch"), [({}, False), ({"priority": 1}, True), ({"priority": -1}, False)])
def test_a_priority_above_0_is_of_class_batch(change: dict[str, Any], batch: bool) -> None:
    body = parse(ResponsesRequest, {"model": "m", "input": "a"} | change)
    assert body.chat.batch == batch


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"input": 5}, "input", "found 5; allowed are a string and a list of items"),
        ({"input": []}, "input", "found no message"),
        ({"input": [{"type": "reasoning"}]}, "input", "found no message"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "send store: false"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing, but required"),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role", "found 'king'"),
        ({"input": [USER | {"colour": 1}]}, "input[0].colour", "not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
            "input_text or output_text",
        ),
        ({"input": [CALL, OUTPUT | {"output": 1}]}, "input[1].output", "input_text or output_text"),
        ({"input": [OUTPUT]}, "input[0].call_id", "no function_call item before it"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "the client runs the tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "found 'f' twice"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name", "found 'a b'"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type", "found 'array'"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name", "allowed are f"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "allowed are none, auto, required"),
        ({"tools": [TOOL], "tool_choice": ALLOWED}, "tool_choice", "mode: auto or required"),
        ({"tool_choice": ALLOWED | {"mode": "auto"}}, "tool_choice.tools[0].name", "there are no tools"),
        ({"priority": 1.5}, "priority", "found 1.5"),
        ({"tools": [TOOL], "text": {"format": {"type": "json_object"}}}, "text.format", "not together with tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "found 'yaml'"),
        ({"top_logprobs": 2}, "top_logprobs", "allowed only with include"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": {"id": "c"}}, "conversation", "send the whole of it"),
        ({"background": True}, "background", "no answer is kept"),
        ({"metadata": {"a": 1}}, "metadata.a", "found 1"),
        ({"colour": 1}, "colour", "not supported; allowed are model, "),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str, words: str) -> None:
    error = refused(change)
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert words in str(error)


@pytest.mark.parametrize(
    ("field", "own"),
    [
        ("messages", "input"),
        ("messages[1].content", "input"),
        ("prompt", "input"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("tools[0].function.parameters", "tools[0].parameters"),
        ("tools", "tools"),
        ("stop_token_ids[2]", "stop_token_ids[2]"),
    ],
)
def test_errors_of_the_chat_completion_name_this_api_s_fields(field: str, own: str) -> None:
    error = in_own_names(InvalidRequestError(f"{field}: found 1", field))
    assert (error.field, str(error)) == (own, f"{own}: found 1")


def test_an_error_without_a_field_stays() -> None:
    error = InvalidRequestError("not now")
    assert in_own_names(error) is error
