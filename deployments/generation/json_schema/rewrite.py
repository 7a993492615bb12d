"""Rewrites a client's JSON schema, keyword by keyword, into one that llguidance 1.9 keeps to.

What validators of draft 2020-12 accept is never widened, and narrowed only where no other way is known (said at each
place). Keywords that assert nothing (annotations, and those no draft knows) are left out; those that llguidance does
not implement are refused, save where their value asserts nothing. What llguidance implements:
https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from deployments.generation.json_schema import objects, strings
from deployments.generation.json_schema.choices import SchemaChoice, settle
from deployments.generation.json_schema.intersections import check_intersections
from deployments.generation.json_schema.numbers import (
    bounds,
    check_exact,
    counts,
    exact_step,
    is_number,
    multiples,
    number,
)
from deployments.generation.json_schema.place import Place
from deployments.generation.json_schema.recursion import prune_endless

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
DRAFTS = re.compile(r"https?://json-schema\.org/(draft/20(19-09|20-12)|draft-0[467])/schema#?")
# Keywords that llguidance does not implement, each with the value that asserts nothing.
NEUTRAL: dict[str, object] = {
    "uniqueItems": False,
    "dependentRequired": {},
    "dependentSchemas": {},
    "dependencies": {},
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
    "not": False,
}
REFUSED = ("contains", "$dynamicRef", "$recursiveRef")


MOST_LIKELY = ("pattern", "patternProperties", "minProperties", "maxProperties")  # to be refused by llguidance
TOO_BIG = "grammar size"  # how llguidance begins to say so
MAX_TRIED = 100


@dataclass(frozen=True)
class Rewritten:
    """`schema` is for llguidance. `places` says where each of its parts came from, the innermost first."""

    schema: dict[str, Any]
    places: list[tuple[Place, dict[str, Any]]]

    def place_of(self, said: str, complaint: Callable[[dict[str, Any]], str]) -> Place:
        """The innermost part about which `complaint` says what llguidance `said` about the whole; else the root."""
        if said.startswith(TOO_BIG):  # no part is at fault, and each of them might take as long as the whole
            return Place(self.places[-1][0].field)
        likely = sorted(self.places[:-1], key=lambda place: not any(key in place[1] for key in MOST_LIKELY))
        definitions = {"$defs": self.schema["$defs"]} if "$defs" in self.schema else {}
        for place, part in likely[:MAX_TRIED]:
            if complaint(part | definitions).partition("\n")[0] == said.partition("\n")[0]:
                return place
        return Place(self.places[-1][0].field)


def rewritten(schema: dict[str, Any], field: str) -> Rewritten:
    """Raises InvalidRequestError, which says where in the schema, for what llguidance is known not to keep to. `field`
    names the request's field that the schema came in."""
    try:
        return _Rewriter(schema, Place(field)).document()
    except RecursionError as error:
        raise Place(field).refusal("nested too deeply (recursion)") from error


class _Rewriter:
    def __init__(self, root: dict[str, Any], place: Place) -> None:
        self._root = root
        self._place = place
        self._definitions: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # of definitions, by reference
        self._waiting: list[str] = []  # references whose schemas are still to be rewritten
        self._choices: list[SchemaChoice] = []
        self._keys = objects.KeysCache()
        self._places: list[tuple[Place, dict[str, Any]]] = []

    def document(self) -> Rewritten:
        result = self.schema(self._root, self._place)
        while self._waiting:
            reference = self._waiting.pop()
            self._definitions[self._names[reference]] = self.schema(*self._target(reference))
        settle(self._choices, self._definitions)
        result = prune_endless(result, self._definitions, self._place)
        check_intersections(result, self._definitions, self._place)
        if not isinstance(result, dict):
            raise self._place.refusal("no value fits")
        result |= {"$defs": self._definitions} if self._definitions else {}
        return Rewritten(result, [*self._places, (self._place, result)])

    def schema(self, schema: object, place: Place) -> Any:
        """The schema rewritten: a new dictionary, or True or False."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise place.found(schema, "an object, true or false")
        if "not" in schema and schema["not"] in (True, {}):  # as zod writes what may never be there
            return False
        self._check_keywords(schema, place)
        types = _types(schema, place)
        result: dict[str, Any] = {"type": types} if types else {}
        if not types or "integer" in types or "number" in types:
            result |= self._numbers(schema, types, place)
        if not types or "string" in types:
            result |= self._strings(schema, place)
        if not types or "array" in types:
            result |= self._arrays(schema, place)
        if not types or "object" in types:
            result |= objects.rewritten(schema, place, self.schema, self._keys, self.define)
        self._constants(schema, result, place)
        self._combinations(schema, result, place)
        self._places.append((place, result))
        return result

    def define(self, schema: Any) -> dict[str, str]:
        """A reference to a schema that is rewritten already and used in several places."""
        name = f"shared{len(self._definitions) + len(self._waiting)}"
        self._definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}

    def _check_keywords(self, schema: dict[str, Any], place: Place) -> None:
        for keyword, neutral in NEUTRAL.items():
            if keyword in schema and schema[keyword] != neutral:
                raise (place / keyword).found(schema[keyword], f"{neutral!r} or none: it cannot be followed")
        for keyword in REFUSED:
            if keyword in schema:
                raise (place / keyword).found(schema[keyword], "none: it cannot be followed")
        if "if" in schema and ("then" in schema or "else" in schema):
            raise (place / "if").found(schema["if"], "none: conditions cannot be followed")
        if "$schema" in schema and not DRAFTS.fullmatch(str(schema["$schema"])):
            raise (place / "$schema").found(schema["$schema"], "draft 2020-12, 2019-09, 07, 06 or 04 of JSON Schema")
        if "$id" in schema and schema is not self._root and isinstance(schema["$id"], str):
            raise (place / "$id").found(schema["$id"], "none below the schema's root")

    def _numbers(self, schema: dict[str, Any], types: list[str], place: Place) -> dict[str, Any]:
        integer = "integer" in types
        limits = bounds(schema, integer, place)
        if "multipleOf" not in schema:
            return dict(limits)
        place /= "multipleOf"
        few = multiples(schema["multipleOf"], limits, integer, place)
        if few is None or "enum" in schema or "const" in schema:
            return {**limits, "multipleOf": schema["multipleOf"]}
        if not types or set(types) - {"integer", "number"}:
            raise place.refusal("beside narrow bounds the schema's type has to be integer or number")
        if not few:
            raise place.refusal(f"no multiple of {schema['multipleOf']} is within the bounds")
        return {"enum": few}

    def _strings(self, schema: dict[str, Any], place: Place) -> dict[str, Any]:
        result: dict[str, Any] = counts(schema, place, "minLength", "maxLength")
        if "pattern" in schema:
            result["pattern"] = strings.pattern(schema["pattern"], place / "pattern")
            if strings.may_need_unwritable(result["pattern"]):
                result["allOf"] = [{"pattern": strings.WRITABLE_PATTERN}]
        if "format" in schema and (name := strings.string_format(schema["format"], place / "format")):
            result["format"] = name
        return result

    def _arrays(self, schema: dict[str, Any], place: Place) -> dict[str, Any]:
        result: dict[str, Any] = counts(schema, place, "minItems", "maxItems")
        prefix, rest = (
            ("items", "additionalItems") if isinstance(schema.get("items"), list) else ("prefixItems", "items")
        )
        if prefix == "items" and "prefixItems" in schema:
            raise (place / "items").found(schema["items"], "a schema beside prefixItems")
        if "prefixItems" in schema and "items" in schema and "draft-0" in str(self._root.get("$schema")):
            raise (place / "prefixItems").found(schema["prefixItems"], "none beside items, in a draft before 2019-09")
        if prefix in schema:
            if not isinstance(schema[prefix], list):
                raise (place / prefix).found(schema[prefix], "a list of schemas")
            items = enumerate(schema[prefix])
            result["prefixItems"] = [self.schema(item, place / prefix / index) for index, item in items]
        if rest in schema:
            result["items"] = self.schema(schema[rest], place / rest)
        return result

    def _constants(self, schema: dict[str, Any], result: dict[str, Any], place: Place) -> None:
        """`const` and `enum`, as one enum. The multiples of multipleOf are picked here."""
        if "const" in schema:
            check_constant(schema["const"], place / "const")
            result["const"] = schema["const"]
        if "enum" in schema:
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                raise (place / "enum").found(schema["enum"], "a list of values")
            for index, value in enumerate(schema["enum"]):
                check_constant(value, place / "enum" / index)
            result["enum"] = schema["enum"]
        if ("const" in schema or "enum" in schema) and "multipleOf" in result:
            step = exact_step(result.pop("multipleOf"), place / "multipleOf")
            values = result.pop("enum", None) or [schema["const"]]
            values = [value for value in values if not is_number(value) or Fraction(repr(value)) % step == 0]
            if not values:
                raise (place / "multipleOf").refusal("none of the allowed values is a multiple")
            result["enum"] = values

    def _combinations(self, schema: dict[str, Any], result: dict[str, Any], place: Place) -> None:
        parts: list[Any] = result.pop("allOf", [])
        for keyword in ("allOf", "anyOf", "oneOf"):
            if keyword not in schema:
                continue
            options = schema[keyword]
            if not isinstance(options, list) or not options:
                raise (place / keyword).found(options, "a list of schemas")
            options = [self.schema(option, place / keyword / index) for index, option in enumerate(options)]
            if keyword == "allOf":
                parts += options
            elif keyword == "anyOf":
                parts.append({"anyOf": options})
            else:
                parts.append({"anyOf": options})
                self._choices.append(SchemaChoice(options, schema.get("discriminator"), place / keyword))
        if "$ref" in schema:
            parts.append(self._reference(schema["$ref"], place / "$ref"))
        if len(parts) == 1 and isinstance(parts[0], dict) and not set(parts[0]) & set(result):
            result |= parts[0]
        elif parts:
            result["allOf"] = parts

    def _reference(self, reference: object, place: Place) -> dict[str, str]:
        if not isinstance(reference, str):
            raise place.found(reference, "a reference")
        base = self._root.get("$id")
        if isinstance(base, str) and base.rstrip("#") and reference.startswith(base.rstrip("#")):
            reference = reference[len(base.rstrip("#")) :] or "#"
        if reference != "#" and not reference.startswith("#/"):
            raise place.found(reference, "#/… within this schema: nibble does not fetch others")
        if reference not in self._names:
            self._target(reference, place)
            last = re.sub(r"[^A-Za-z0-9]", "_", reference.rpartition("/")[2])
            self._names[reference] = f"{len(self._names)}_{last}"
            self._waiting.append(reference)
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _target(self, reference: str, place: Place | None = None) -> tuple[Any, Place]:
        """The schema that a reference (`#/…`) names, and where it is."""
        value: Any = self._root
        for part in reference.split("/")[1:]:
            key = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise (place or self._place).found(reference, "a place in this schema") from None
        return value, Place(self._place.field, reference)


def check_constant(value: object, place: Place) -> None:
    """Refuses what llguidance would write as something else."""
    if isinstance(value, str):
        strings.check_text(value, place)
    elif is_number(value):
        check_exact(number(value, place), place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_constant(item, place / index)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_constant(key, place / key)
            check_constant(item, place / key)


def _types(schema: dict[str, Any], place: Place) -> list[str]:
    """Empty where the schema does not say."""
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    for name in types:
        if name not in TYPES:
            raise (place / "type").found(name, ", ".join(TYPES))
    if not types and "type" in schema:
        raise (place / "type").found([], "at least one type")
    if "number" in types:
        return [name for name in dict.fromkeys(types) if name != "integer"]
    return list(dict.fromkeys(types))
