from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import InvalidRequestError
from deployments.generation.grammar import MAX_CHARACTERS, MAX_GBNF_RULES
from deployments.records import Grammar
from tests.unit.deployments.generation.test_grammar import TOKENIZERS, allowed_by, rules, schema_of


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def chain(count: int, rule: Callable[[int], str], last: str) -> str:
    """Rules that each lead to the next."""
    return "".join(map(rule, range(count))) + last


REFUSED = {
    "no JSON": (Grammar("json_schema", "{", "json_schema"), "not JSON"),
    "no object": (Grammar("json_schema", "[1]", "json_schema"), r"found \[1\], allowed is an object"),
    "unknown type": (schema_of({"type": "strnig"}), "strnig"),
    "unknown keyword": (schema_of({"not": {"type": "object"}}), "not"),
    "unsatisfiable": (schema_of({"type": "integer", "minimum": 3, "maximum": 2}), "[Uu]nsatisfiable|minimum"),
    "look-around in a schema": (
        schema_of({"properties": {"a": {"items": {"pattern": "(?!a)b"}}}}),
        "#/properties/a/items: .*look-around",
    ),
    "patterns that overlap": (
        schema_of({"anyOf": [{}, {"patternProperties": {"^a": {}, "b$": {}}}]}),
        "#/anyOf/1: .*not disjoint",
    ),
    "half a pair": (schema_of({"const": "\ud800"}), "surrogate|escape"),
    "no rule": (rules("start: a"), "unknown name"),
    "neither Lark nor GBNF": (rules("hello world"), "Expected ::="),
    "GBNF without root": (rules('item ::= "a"'), "root"),
    "half a pair in a grammar": (rules('start: "\ud800"'), "surrogate"),
    "look-around": (rules("start: /(?!a)b/"), "look-around"),
    "a special token": (rules("start: <s>"), "no token of this model may follow"),
    "a special token's id": (rules("start: <[1]>"), "no token of this model may follow"),
    "an unknown special token": (rules("start: <foo>"), "unknown special token"),
    "no end": (rules("start: start"), "NoExtension|no token"),
    "nothing": (rules("start: A\nA: /a/ & /b/"), "NoExtension|no token"),
    "deep JSON": (Grammar("json_schema", nested(5000), "response_format"), "recursion|not JSON"),
    "long schema": (schema_of({"const": "a" * MAX_CHARACTERS["json_schema"]}), "found [0-9]+ characters, allowed are"),
    "long grammar": (rules("start: " + '"a"' * MAX_CHARACTERS["grammar"]), "found [0-9]+ characters, allowed are"),
    "many GBNF rules": (rules("a::=b\n" * (MAX_GBNF_RULES + 1)), "found 501 rules, allowed are 500"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_before_anything_is_generated(name: str) -> None:
    grammar, why = REFUSED[name]
    with pytest.raises(InvalidRequestError, match=f"(?s)^{grammar.field}: .*({why})") as refused:
        TOKENIZERS["llama"].mask(grammar)
    assert refused.value.field == grammar.field
    assert len(str(refused.value)) < 700


HOSTILE = {
    "nested repetition": schema_of({"type": "string", "pattern": "(a{1000}){1000}"}),
    "nested bounds": schema_of({"type": "string", "pattern": "^(([a-z]{0,100}){0,100}){0,100}$"}),
    "exponential automaton": schema_of({"type": "string", "pattern": "(a|b)*a(a|b){25}c"}),
    "many items": schema_of({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "long string": schema_of({"type": "string", "maxLength": 10**9}),
    "relevance": schema_of({"type": "integer", "multipleOf": 999999937}),
    "product of choices": schema_of(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(10)]} for i in range(8)]}
    ),
    "rules that double": rules(
        "start: r0\n" + chain(40, lambda i: f"r{i}: r{i + 1} r{i + 1}\n", 'r40: "a"')
    ),
    "terminals that double": rules(
        "start: R0\n" + chain(40, lambda i: f"R{i}: R{i + 1} R{i + 1}\n", 'R40: "a"')
    ),
    "repeated repetition": rules('start: (("a"{1000}){1000}){1000}'),
    "parentheses": rules("start: " + "(" * 8000 + '"a"' + ")" * 8000),
    "GBNF parentheses": rules("root ::= " + "(" * 8000 + '"a"' + ")" * 8000),
    # Within the bounds, and deep enough to overflow the usual stack in llguidance, which ends the process.
    "chain of references": Grammar(
        "json_schema",
        '{"$ref":"#/$defs/0","$defs":{'
        + chain(38, lambda i: f'"{i}":' + nested(60).replace("{}", f'{{"$ref":"#/$defs/{i + 1}"}}') + ",", '"38":{}}}'),
        "response_format",
    ),
    "chain of terminals": rules(
        "start: R0\n" + chain(150, lambda i: f"R{i}: {'(' * 28}R{i + 1}{')?' * 28}\n", 'R150: "a"')
    ),
    "chain of rules": rules("start: r0\n" + chain(1100, lambda i: f"r{i}: r{i + 1}\n", 'r1100: "a"')),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_bounded(name: str) -> None:
    """This process survives; what goes on for as long as the model likes stays possible."""
    tokenizer, grammar = TOKENIZERS["llama"], HOSTILE[name]
    with contextlib.suppress(InvalidRequestError):
        mask = tokenizer.mask(grammar)
        for step in range(40):
            allowed = allowed_by(mask)
            assert allowed
            mask.accept(allowed[step % len(allowed)])


def test_a_reference_to_the_network_fetches_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for grammar in (schema_of({"$ref": address}), rules(f'start: %json {{"$ref": "{address}"}}')):
            with pytest.raises(InvalidRequestError, match="does not fetch"):
                TOKENIZERS["llama"].mask(grammar)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_reference_to_a_file_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    with pytest.raises(InvalidRequestError, match="does not fetch"):
        TOKENIZERS["llama"].mask(schema_of({"$ref": (tmp_path / "schema.json").as_uri()}))
