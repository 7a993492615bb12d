"""Intersections of schemas (`allOf`, or a reference or choice beside other keywords), which llguidance computes itself.

It computes most of them well, and refuses some. Two kinds it neither refuses nor follows: the multiples of two steps
or within two bounds, and the keys that patterns leave. The text then violates the schema or comes to a dead end.
"""

from __future__ import annotations

from typing import Any

from deployments.generation.json_schema.choices import type_of
from deployments.generation.json_schema.place import Place
from deployments.generation.json_schema.recursion import children

NUMBERS = {"minimum", "maximum"}
OBJECTS = {"properties", "additionalProperties", "required", "minProperties", "maxProperties"}
COMBINING = ("allOf", "anyOf", "$ref", "enum", "const")
MAX_INTERSECTIONS = 200


def check_intersections(root: Any, definitions: dict[str, Any], place: Place) -> None:
    """Raises InvalidRequestError where an intersection is of one of the two kinds."""
    schemas, seen = [root, *definitions.values()], 0
    if not {"multipleOf", "patternProperties"} & _kinds({"allOf": schemas}, definitions):
        return
    while schemas:
        schema = schemas.pop()
        if not isinstance(schema, dict):
            continue
        schemas += children(schema)
        parts = _parts(schema)
        if len(parts) < 2:
            continue
        seen += 1
        if seen > MAX_INTERSECTIONS:
            raise place.refusal(
                f"found more than {MAX_INTERSECTIONS} intersections of schemas (allOf, or $ref or anyOf beside other "
                "keywords), allowed are so many beside multipleOf or patternProperties"
            )
        kinds = [_kinds(part, definitions) for part in parts]
        for risky, other in (("multipleOf", "numbers"), ("patternProperties", "objects")):
            if sum(other in kind for kind in kinds) > 1 and any(risky in kind for kind in kinds):
                raise place.refusal(
                    f"found {risky} in an intersection of schemas (allOf, or $ref or anyOf beside other keywords), "
                    f"which cannot be followed; write what it says of {other} into one schema"
                )


def _parts(schema: dict[str, Any]) -> list[Any]:
    """The schemas whose intersection `schema` is."""
    own = {key: value for key, value in schema.items() if key not in COMBINING and key != "type"}
    parts = [own] if own else []
    parts += schema.get("allOf", [])
    parts += [{keyword: schema[keyword]} for keyword in COMBINING[1:] if keyword in schema]
    return parts


def _kinds(schema: Any, definitions: dict[str, Any]) -> set[str]:
    """What a schema speaks of at any depth, behind references too: an intersection goes down to each value."""
    kinds: set[str] = set()
    waiting, seen = [schema], set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        kinds |= {"multipleOf", "patternProperties"} & set(schema)
        constants = [schema["const"]] if "const" in schema else schema.get("enum", [])
        types = {type_of(value) for value in constants}
        if NUMBERS & set(schema) or "multipleOf" in schema or "number" in types:
            kinds.add("numbers")
        if OBJECTS & set(schema) or "patternProperties" in schema or "object" in types:
            kinds.add("objects")
        waiting += children(schema)
        if "$ref" in schema and (name := schema["$ref"].rpartition("/")[2]) not in seen:
            seen.add(name)
            waiting.append(definitions[name])
    return kinds
