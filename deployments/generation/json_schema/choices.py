"""`oneOf` of a JSON schema: llguidance follows anyOf, which is the same where no value fits two of the options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from deployments.generation.json_schema.numbers import is_number
from deployments.generation.json_schema.place import Place

MAX_COMPARISONS = 50_000  # of options and what is in them, pair by pair, in a whole schema
MAX_DEPTH = 6


@dataclass
class SchemaChoice:
    """`options`: those of a oneOf that is an anyOf in the rewritten schema. `discriminator`: OpenAPI's keyword beside
    it, which pydantic writes too."""

    options: list[Any]
    discriminator: object
    place: Place


def settle(choices: list[SchemaChoice], definitions: dict[str, Any]) -> None:
    """Raises InvalidRequestError where two options are not known to exclude each other."""
    comparison = _Comparison(definitions)
    for choice in choices:
        _require(choice, definitions)
        for (i, first), (j, second) in combinations(enumerate(choice.options), 2):
            if not comparison.exclusive(first, second):
                raise choice.place.refusal(
                    f"options {i} and {j} might both fit one value, which cannot be followed; use anyOf, or a required "
                    "property with another const in each option"
                )


def _require(choice: SchemaChoice, definitions: dict[str, Any]) -> None:
    """Makes the discriminator's property required in each option, as OpenAPI says it has to be."""
    name = choice.discriminator.get("propertyName") if isinstance(choice.discriminator, dict) else None
    if not isinstance(name, str):
        return
    for index, option in enumerate(choice.options):
        schema = _resolved(option, definitions)
        if name in schema.get("properties", {}) and name not in schema.get("required", []):
            with_name = schema | {"required": [*schema.get("required", []), name]}
            if "$ref" in option:
                definitions[key := f"{option['$ref'].rpartition('/')[2]}_of_{len(definitions)}"] = with_name
                with_name = {"$ref": f"#/$defs/{key}"}
            choice.options[index] = with_name


def _resolved(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Follows references that stand alone."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict) or set(schema) != {"$ref"}:
            break
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema if isinstance(schema, dict) else {}


class _Comparison:
    """Pairs of schemas, as many as MAX_COMPARISONS. Beyond that none is known to exclude another."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self._definitions = definitions
        self._left = MAX_COMPARISONS

    def exclusive(self, first: Any, second: Any, depth: int = 0) -> bool:
        """Whether surely no value fits both."""
        self._left -= 1
        if first is False or second is False:
            return True
        if depth > MAX_DEPTH or self._left < 0:
            return False
        first, second = _resolved(first, self._definitions), _resolved(second, self._definitions)
        for one, other in ((first, second), (second, first)):
            if "anyOf" in one and all(self.exclusive(option, other, depth + 1) for option in one["anyOf"]):
                return True
        types = _value_types(first) & _value_types(second)
        values, other_values = _values(first), _values(second)
        if not types or (values is not None and other_values is not None and not values & other_values):
            return True
        return types == {"object"} and self._exclusive_property(first, second, depth)

    def _exclusive_property(self, first: dict[str, Any], second: dict[str, Any], depth: int) -> bool:
        """Whether a property that either requires has values that exclude each other."""
        properties, others = first.get("properties", {}), second.get("properties", {})
        return any(
            self.exclusive(properties[key], others[key], depth + 1)
            for key in (*first.get("required", ()), *second.get("required", ()))
            if key in properties and key in others
        )


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The values that const or enum allow, comparable."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if listed is None:
        return None
    return {json.dumps(float(value) if is_number(value) else value, sort_keys=True) for value in listed}


def _value_types(schema: dict[str, Any]) -> set[str]:
    """The types of values that fit, integer counted as number."""
    types = set(schema.get("type", ("null", "boolean", "number", "string", "array", "object")))
    if "integer" in types:
        types = types - {"integer"} | {"number"}
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return types if listed is None else types & {type_of(value) for value in listed}


def type_of(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
