"""Grammars of forced calls: a form's own text around the arguments, which follow each tool's JSON schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deployments.records import Grammar, Tool

# With these beside them, `properties` are not all that an object may have.
COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties", "if", "dependentSchemas"}


def call_grammar(start: str, tools: Sequence[Tool], key: str) -> Grammar:
    """`start`: the body of Lark's rule of this name, made of the rule `call`: an object with a tool's name and, at
    `key`, its arguments."""
    calls = " | ".join(
        f"{literal(_head(tool.name, key))} @arguments{index} {literal('}')}" for index, tool in enumerate(tools)
    )
    schemas = [[tool.name, arguments_schema(json.loads(tool.parameters))] for tool in tools]
    return Grammar("tool_calls", json.dumps({"rules": f"start: {start}\ncall: {calls}\n", "schemas": schemas}), "tools")


def repeated(between: str) -> str:
    """Any number of further calls, each behind the text `between`."""
    return f"({literal(between)} call)*"


def literal(text: str) -> str:
    """As Lark spells it."""
    return json.dumps(text)


def arguments_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """An object, with the properties alone that the schema names, unless it says that there may be others: a function
    has no use for arguments that it does not know."""
    named = not parameters or ("properties" in parameters and not COMBINED & set(parameters))
    return ({"additionalProperties": False} if named else {}) | parameters | {"type": "object"}


def _head(name: str, key: str) -> str:
    return f'{{"name": {json.dumps(name)}, "{key}": '
