"""JSON to a request's record: which field an error names, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InvalidRequestError
from deployments.api.requests.parsing import body_schema, parse, shorten
from deployments.api.requests.schema import ChatRequest, CompletionRequest, DetokenizeRequest, ModelBody

COMPLETION = {"model": "m", "prompt": "a"}


def refused(body_class: type[ModelBody], body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        parse(body_class, body)
    return error.value


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"max_tokens": -1}, "max_tokens", "found -1; input should be greater than or equal to 0"),
        ({"temperature": "1"}, "temperature", "found '1'; "),
        ({"colour": 1}, "colour", "not supported; allowed are model, "),
        ({"suffix": "x"}, "suffix", "found 'x', allowed are null: "),
        ({"prompt": {"text": "a"}}, "prompt", "found {'text': 'a'}; allowed are a string, a list of strings"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "found 101; "),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "found 'x'; "),
        ({"stop": ["a", ""]}, "stop[1]", "found ''; "),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "found 1; "),
        ({"response_format": {"type": "yaml"}}, "response_format", "found {'type': 'yaml'}; "),
        ({"stream_options": {"x": 1}}, "stream_options.x", "not supported"),
    ],
)
def test_an_error_names_the_field_and_what_was_found(fields: dict[str, Any], field: str, words: str) -> None:
    error = refused(CompletionRequest, COMPLETION | fields)
    assert error.field == field
    assert str(error).startswith(f"{field}: {words}")


def test_what_is_missing_is_named() -> None:
    assert str(refused(CompletionRequest, {"prompt": "a"})) == "model: missing, but required"
    assert str(refused(ChatRequest, {"model": "m", "messages": [{"role": "user"}]})) == (
        "messages[0].content: missing, but required"
    )


def test_a_content_of_the_wrong_form_is_one_error() -> None:
    error = refused(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [{"type": "image"}]}]})
    assert error.field == "messages[0].content"
    assert "a string or a list of parts" in str(error)


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_is_an_object(body: Any) -> None:
    error = refused(CompletionRequest, body)
    assert str(error) == f"body: found {type(body).__name__}, expected a JSON object"
    assert error.field is None


def test_null_is_as_left_out_but_for_what_is_required() -> None:
    assert parse(CompletionRequest, COMPLETION | {"max_tokens": None, "seed": None}).max_tokens == 16
    assert refused(CompletionRequest, COMPLETION | {"prompt": None}).field == "prompt"
    assert parse(CompletionRequest, COMPLETION | {"colour": None, "shades": []}) == parse(CompletionRequest, COMPLETION)
    assert refused(CompletionRequest, COMPLETION | {"seed": []}).field == "seed"


def test_fields_are_checked_against_each_other() -> None:
    assert refused(CompletionRequest, COMPLETION | {"min_tokens": 17}).field == "min_tokens"


def test_a_long_value_is_shortened() -> None:
    assert shorten("a" * 78) == repr("a" * 78)
    assert shorten("a" * 79) == "'" + "a" * 76 + "..."
    assert len(str(refused(DetokenizeRequest, {"model": "m", "tokens": "x" * 10_000}))) < 200


def test_the_document_allows_null_where_parse_does() -> None:
    properties = body_schema(CompletionRequest)["properties"]
    assert {"type": "null"} not in properties["prompt"]["anyOf"]
    assert properties["model"]["type"] == "string"
    assert properties["suffix"]["enum"] == [None, []]
    assert properties["length_penalty"]["enum"] == [None, [], 1.0]
    assert body_schema(CompletionRequest)["additionalProperties"] == {"enum": [None, []]}
    number, null = properties["max_tokens"]["anyOf"]
    assert (number["type"], number["minimum"], null) == ("integer", 0, {"type": "null"})
    assert properties["max_tokens"]["default"] == 16
    assert properties["seed"]["anyOf"].count({"type": "null"}) == 1
