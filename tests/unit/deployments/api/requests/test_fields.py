"""The table of fields: it says what the parser does, and docs/reference/fields.md says the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body, ModelBody
from deployments.api.requests.fields import ANYTHING, BY_PLACE, FIELDS, Field, Place
from deployments.api.requests.formats import StructuredOutputs
from deployments.api.requests.messages import ChatMessage, TextPart
from deployments.api.requests.parsing import body_schema, parse
from deployments.api.requests.responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputText,
    MessageItem,
    ReasoningConfig,
    ReasoningItem,
    ResponsesRequest,
    TextConfig,
)
from deployments.api.requests.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    StreamOptions,
    TokenizeRequest,
)
from tests.fields_page import PAGE, page

COMPLETION = {"model": "m", "prompt": "a", "stream": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": True}
BODIES: dict[Place, type[Body]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "embeddings": EmbeddingRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
    "stream_options": StreamOptions,
    "messages[]": ChatMessage,
    "content[]": TextPart,
    "structured_outputs": StructuredOutputs,
    "responses": ResponsesRequest,
    "text": TextConfig,
    "reasoning": ReasoningConfig,
    "message item": MessageItem,
    "function_call item": FunctionCallItem,
    "function_call_output item": FunctionCallOutputItem,
    "reasoning item": ReasoningItem,
    "input part": InputText,
}
RESPONSE = {"model": "m", "input": "a"}
CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
ITEMS: dict[Place, dict[str, Any]] = {
    "message item": {"type": "message", "role": "user", "content": "a"},
    "function_call item": CALL_ITEM,
    "function_call_output item": {"type": "function_call_output", "call_id": "c", "output": "a"},
    "reasoning item": {"type": "reasoning"},
}


def sent(place: Place, name: str, value: Any) -> tuple[type[ModelBody], dict[str, Any], str]:
    """A whole body with one field more, its class, and how an error names the field."""
    match place:
        case "completions":
            return CompletionRequest, COMPLETION | {name: value}, name
        case "chat":
            return ChatRequest, CHAT | {name: value}, name
        case "embeddings":
            return EmbeddingRequest, {"model": "m", "input": "a", name: value}, name
        case "tokenize":
            return TokenizeRequest, {"model": "m", "prompt": "a", name: value}, name
        case "stream_options":
            return CompletionRequest, COMPLETION | {"stream_options": {name: value}}, f"stream_options.{name}"
        case "structured_outputs":
            wanted = {"structured_outputs": {"regex": "a", name: value}}
            return CompletionRequest, COMPLETION | wanted, f"structured_outputs.{name}"
        case "messages[]":
            message = {"role": "user", "content": "a", name: value}
            return ChatRequest, CHAT | {"messages": [message]}, f"messages[0].{name}"
        case "content[]":
            part = {"type": "text", "text": "a", name: value}
            return ChatRequest, CHAT | {"messages": [{"role": "user", "content": [part]}]}, "messages[0].content"
        case "responses":
            return ResponsesRequest, RESPONSE | {name: value}, name
        case "text" | "reasoning":
            return ResponsesRequest, RESPONSE | {place: {name: value}}, f"{place}.{name}"
        case "message item" | "function_call item" | "function_call_output item" | "reasoning item":
            items = [{"role": "user", "content": "a"}, CALL_ITEM, ITEMS[place] | {name: value}]
            return ResponsesRequest, RESPONSE | {"input": items}, f"input[2].{name}"
        case "input part":
            part = {"type": "output_text", "text": "a", name: value}
            return ResponsesRequest, RESPONSE | {"input": [{"role": "user", "content": [part]}]}, "input[0].content"
    raise AssertionError(place)


NOT_IMPLEMENTED = [(place, f) for f in FIELDS for place in f.places if f.neutral is not None]
CASES = pytest.mark.parametrize(("place", "field"), NOT_IMPLEMENTED, ids=[f"{p}-{f.name}" for p, f in NOT_IMPLEMENTED])


@pytest.mark.parametrize("place", BODIES)
def test_what_the_table_calls_implemented_is_what_the_parser_has(place: Place) -> None:
    assert BODIES[place].place == place
    named = {field.name for field in BY_PLACE[place].values() if field.neutral is None}
    assert named == {field.alias or name for name, field in BODIES[place].model_fields.items()}


def test_a_field_has_one_row_in_each_place() -> None:
    rows = [(place, field.name) for field in FIELDS for place in field.places]
    assert len(rows) == len(set(rows))


@CASES
def test_neutral_values_are_left_out(place: Place, field: Field) -> None:
    values = ("x", 1, {"a": [None]}, True) if field.neutral == ANYTHING else field.neutral or ()
    body_class, plain, _ = sent(place, field.name, None)
    for value in (None, [], *values):
        _, body, _ = sent(place, field.name, value)
        assert parse(body_class, body) == parse(body_class, plain)


@CASES
def test_other_values_are_refused_by_name_with_what_is_allowed(place: Place, field: Field) -> None:
    if field.neutral == ANYTHING:
        return  # there are none
    body_class, body, name = sent(place, field.name, {"other": 1})
    with pytest.raises(InvalidRequestError) as error:
        parse(body_class, body)
    assert error.value.field == name
    assert str(error.value) == f"{name}: found {{'other': 1}}, {field.refusal}"


@cache
def document_of(body_class: type[ModelBody]) -> jsonschema.Draft202012Validator:
    schema = body_schema(body_class)
    schema["components"] = {"schemas": schema.pop("$defs", {})}
    return jsonschema.Draft202012Validator(schema)


def documented(body_class: type[ModelBody], body: dict[str, Any]) -> bool:
    """Whether the OpenAPI document allows it."""
    return bool(document_of(body_class).is_valid(body))


@CASES
def test_the_document_allows_the_same_values(place: Place, field: Field) -> None:
    neutral = ("x", {"a": 1}) if field.neutral == ANYTHING else field.neutral or ()
    for value in (None, [], *neutral):
        body_class, body, _ = sent(place, field.name, value)
        assert documented(body_class, body)
    body_class, body, _ = sent(place, field.name, {"other": 1})
    assert documented(body_class, body) == (field.neutral == ANYTHING)


def test_true_is_not_one() -> None:
    with pytest.raises(InvalidRequestError, match=r"^length_penalty: found True, allowed are 1.0, null: it belongs"):
        parse(CompletionRequest, COMPLETION | {"length_penalty": True})


def test_the_page_is_the_table_s() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
