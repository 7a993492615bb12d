"""What a completion's text must look like, in each of the ways that clients say it: OpenAI's `response_format`, vLLM's
`structured_outputs` and `guided_*`, and nibble's `grammar`. All become one grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body
from deployments.records import Grammar

MAX_CHOICE_STRINGS = 1024

SchemaOrText = dict[str, Any] | Annotated[str, Field(min_length=1)]
GrammarText = Annotated[str, Field(min_length=1, description="Lark's or GBNF's syntax.")]
Pattern = Annotated[str, Field(min_length=1, description="A regular expression that the whole text matches.")]
ChoiceStrings = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICE_STRINGS)]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    # `schema` is a method of pydantic's own.
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    place = "structured_outputs"

    # `json` is a method of pydantic's own.
    json_schema: Annotated[SchemaOrText | None, Field(alias="json")] = None
    json_object: bool = False
    regex: Pattern | None = None
    choice: ChoiceStrings | None = None
    grammar: GrammarText | None = None

    def grammars(self) -> Iterator[Grammar]:
        if self.json_object:
            yield any_object("structured_outputs.json_object")
        yield from guided("structured_outputs.", self.json_schema, self.regex, self.choice, self.grammar)


class FormattedBody(Body):
    """The fields of a request that say what its text must look like; at most one of them."""

    response_format: ResponseFormat | None = None
    grammar: GrammarText | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Pattern | None = None
    guided_choice: ChoiceStrings | None = None
    guided_grammar: GrammarText | None = None

    def required_grammar(self) -> Grammar | None:
        """Raises InvalidRequestError for more than one."""
        found = list(self._grammars())
        if len(found) > 1:
            first, second = found[0].field, found[1].field
            raise InvalidRequestError(f"{second}: not together with {first}; send one of them", second)
        return found[0] if found else None

    def _grammars(self) -> Iterator[Grammar]:
        match self.response_format:
            case JsonObjectFormat():
                yield any_object("response_format")
            case JsonSchemaFormat(json_schema=named):
                yield Grammar("json_schema", json.dumps(named.json_schema), "response_format")
        if self.grammar is not None:
            yield Grammar("grammar", self.grammar, "grammar")
        if self.structured_outputs is not None:
            yield from self.structured_outputs.grammars()
        yield from guided("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def any_object(field: str) -> Grammar:
    return Grammar("json_schema", '{"type":"object"}', field)


def guided(
    prefix: str, schema: SchemaOrText | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[Grammar]:
    """`prefix`: of the fields' names, which errors say."""
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        yield Grammar("json_schema", json_object_text(text, f"{prefix}json"), f"{prefix}json")
    if regex is not None:
        yield Grammar("grammar", f"start: /{lark_regex(regex)}/", f"{prefix}regex")
    if choice is not None:
        yield Grammar("grammar", f"start: {' | '.join(map(lark_string, choice))}", f"{prefix}choice")
    if grammar is not None:
        yield Grammar("grammar", grammar, f"{prefix}grammar")


def json_object_text(text: str, field: str) -> str:
    """Raises InvalidRequestError for a text that is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field}: not valid JSON: {error}", field) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field}: found a JSON {type(value).__name__}, expected an object", field)
    return text


def lark_regex(pattern: str) -> str:
    """Between Lark's slashes: those of the pattern are escaped, and it stays on its line. `::=` would make llguidance
    take the whole for GBNF."""

    def escaped(found: re.Match[str]) -> str:
        return {"/": r"\/", "\n": r"\n", "\\\n": r"\n", "::=": r":\x3a="}.get(found[0], found[0])

    return re.sub(r"\\.|/|\n|::=", escaped, pattern, flags=re.DOTALL)


def lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("::=", r":\u003a=")
