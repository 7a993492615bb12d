"""Forced calls: whatever a model draws under the grammar, the reader finds valid calls of the tools in it."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import jsonschema
import pytest

from cluster.errors import InvalidRequestError
from deployments.generation.tool_calls import FORMS
from deployments.records import Tool
from tests.unit.deployments.generation.test_grammar import TOKENIZERS, write, written
from tests.unit.deployments.generation.tool_calls.reading import NAMES, calls, content, read

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
    "add": {
        "properties": {"a": {"$ref": "#/$defs/number"}, "b": {"$ref": "#/$defs/number"}},
        "required": ["a", "b"],
        "$defs": {"number": {"type": "integer", "minimum": -9, "maximum": 9}},
    },
    "now": {},
}


def tool(name: str, parameters: dict[str, Any]) -> Tool:
    return Tool(name, "{}", json.dumps(parameters))


TOOLS = [tool(name, SCHEMAS[name]) for name in NAMES]


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.parametrize("parallel", [False, True])
def test_whatever_is_drawn_are_valid_calls(name: str, parallel: bool) -> None:
    form = FORMS[name]
    called: set[str] = set()
    counts = set()
    for tokenizer, seed in product(TOKENIZERS.values(), range(8)):
        text = written(tokenizer, write(tokenizer, form.grammar(TOOLS, parallel), seed))
        events = read(form, form.opening, text)
        found = calls(events)
        assert content(events) == ""
        for function, arguments in found:
            jsonschema.Draft202012Validator(SCHEMAS[function]).validate(arguments)
            assert isinstance(arguments, dict)
            assert set(arguments) <= set(SCHEMAS[function].get("properties", {}))
        called |= {function for function, _ in found}
        counts.add(len(found))
    assert called == set(NAMES)
    assert (max(counts) > 1) == parallel
    assert min(counts) == 1


def test_a_schema_may_allow_more_than_it_names() -> None:
    form, tokenizer = FORMS["hermes"], TOKENIZERS["llama"]
    for schema in (
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
        {"properties": {}, "allOf": [{"properties": {"x": {"type": "integer"}}, "required": ["x"]}]},
    ):
        text = written(tokenizer, write(tokenizer, form.grammar([tool("add", schema)], False), 0))
        ((_, arguments),) = calls(read(form, form.opening, text))
        assert arguments


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"properties": {"a": {"contains": {}}}}, "#/properties/a/contains: found"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "#/properties/a"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_named_with_its_tool(schema: dict[str, Any], why: str) -> None:
    grammar = FORMS["hermes"].grammar([TOOLS[0], tool("add", schema)], True)
    with pytest.raises(InvalidRequestError) as refused:
        TOKENIZERS["llama"].mask(grammar)
    assert str(refused.value).startswith(f"tools.add.parameters: {why}")
    assert refused.value.field == "tools.add.parameters"


def test_tools_that_are_too_long_are_refused() -> None:
    long = {"properties": {"a": {"description": "a" * 70_000}}}
    with pytest.raises(InvalidRequestError, match=r"tools: found \d+ characters, allowed are 65536"):
        TOKENIZERS["llama"].mask(FORMS["hermes"].grammar([tool("add", long)], False))
