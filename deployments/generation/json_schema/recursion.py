"""Schemas whose every value would be infinite, as that of a list whose `next` is required and never null."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deployments.generation.json_schema.place import Place


def prune_endless(schema: Any, definitions: dict[str, Any], place: Place) -> Any:
    """`schema` and `definitions` with false in place of what has no finite value; llguidance would begin it and find no
    end. Raises InvalidRequestError where that is all."""
    finite: set[str] = set()
    known = -1
    while known < len(finite):
        known = len(finite)
        for name in reversed(definitions):  # a later one is more likely to lead to no other
            if name not in finite and _is_finite(definitions[name], finite):
                finite.add(name)
    if not _is_finite(schema, finite):
        raise place.refusal("no finite value fits: a reference always leads back to itself")
    for name in set(definitions) - finite:
        del definitions[name]
    for part in [schema, *definitions.values()]:
        _prune(part, finite)
    return schema


def _is_finite(schema: Any, finite: set[str]) -> bool:
    """Whether some finite value may fit, when of the definitions only those in `finite` have one."""
    if isinstance(schema, bool):
        return schema
    if not all(_is_finite(part, finite) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_is_finite(option, finite) for option in schema["anyOf"]):
        return False
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in finite:
        return False
    constant = "enum" in schema or "const" in schema
    return constant or any(_is_finite_of(name, schema, finite) for name in schema.get("type", ["null"]))


def _is_finite_of(name: str, schema: dict[str, Any], finite: set[str]) -> bool:
    """Whether some finite value of one type may fit."""
    needed: list[Any] = []
    if name == "object":
        rest = schema.get("additionalProperties", True) if "patternProperties" not in schema else True
        needed = [schema.get("properties", {}).get(key, rest) for key in schema.get("required", ())]
    elif name == "array":
        prefix, count = schema.get("prefixItems", []), schema.get("minItems", 0)
        needed = prefix[:count] + ([schema.get("items", True)] if count > len(prefix) else [])
    return all(_is_finite(part, finite) for part in needed)


def _prune(schema: Any, finite: set[str]) -> None:
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        for owner, key in _optional_children(schema):
            if not _is_finite(owner[key], finite):
                owner[key] = False
        waiting += children(schema)


def _optional_children(schema: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield schema, keyword
    for keyword in ("properties", "patternProperties"):
        yield from ((schema[keyword], key) for key in schema.get(keyword, ()))
    for keyword in ("prefixItems", "anyOf"):
        yield from ((schema[keyword], index) for index in range(len(schema.get(keyword, ()))))


def children(schema: dict[str, Any]) -> list[Any]:
    """The schemas that a rewritten schema consists of."""
    return [*(owner[key] for owner, key in _optional_children(schema)), *schema.get("allOf", [])]
