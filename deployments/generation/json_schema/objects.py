"""Objects of a JSON schema: which schema each key gets, and whether any key is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deployments.generation.json_schema.numbers import counts
from deployments.generation.json_schema.place import Place
from deployments.generation.json_schema.strings import Keys, any_key, check_text, pattern

MAX_PATTERNS = 32  # in a whole schema: each takes llguidance some milliseconds
MAX_PROBES = 128  # likewise

Rewrite = Callable[[object, Place], Any]
Define = Callable[[Any], dict[str, str]]


class KeysCache:
    """The patterns of one schema's `patternProperties`."""

    def __init__(self) -> None:
        self._keys: dict[str, Keys] = {}
        self._probes = 0

    def of(self, source: str, place: Place) -> Keys:
        if source not in self._keys:
            if len(self._keys) == MAX_PATTERNS:
                raise place.refusal(f"found more patterns, allowed are {MAX_PATTERNS}")
            self._keys[source] = Keys(source, place)
        return self._keys[source]

    def any(self, place: Place, without: Iterable[str], of: str | None = None, outside: Iterable[str] = ()) -> bool:
        """As `strings.any_key`."""
        self._probes += 1
        if self._probes > MAX_PROBES:
            raise place.refusal(f"found more objects with patterns, allowed are about {MAX_PROBES // 2}")
        return any_key(without, of, outside)


def rewritten(
    schema: dict[str, Any], place: Place, rewrite: Rewrite, cache: KeysCache, define: Define
) -> dict[str, Any]:
    """The keywords of `schema` that speak of objects, each key of `properties` bound by all that applies to it."""
    properties = {
        key: rewrite(value, place / "properties" / key) for key, value in _map(schema, "properties", place).items()
    }
    patterns: dict[str, Any] = {}
    for source, value in _map(schema, "patternProperties", place).items():
        source = pattern(source, place / "patternProperties" / source)
        patterns[source] = rewrite(value, place / "patternProperties" / source)
    required = _required(schema, place)
    for key in (*properties, *required):
        check_text(key, place / "properties" / key)
    result: dict[str, Any] = {}
    if "additionalProperties" in schema:
        result["additionalProperties"] = rewrite(schema["additionalProperties"], place / "additionalProperties")
    if "propertyNames" in schema:
        _bind_names(schema["propertyNames"], properties, patterns, result, required, place, define)
    if patterns:
        patterns = _bind_patterns(properties, patterns, required, result, place, cache, define)
    if properties:
        result["properties"] = properties
    if patterns:
        result["patternProperties"] = patterns
    if required:
        result["required"] = required
    return result | _numbers_of_properties(schema, len(required), place)


def _bind_patterns(
    properties: dict[str, Any],
    patterns: dict[str, Any],
    required: list[str],
    result: dict[str, Any],
    place: Place,
    cache: KeysCache,
    define: Define,
) -> dict[str, Any]:
    """Gives properties the schemas of the patterns that match them, and returns the patterns that match other keys."""
    place /= "patternProperties"
    patterns = {source: _shared(value, define) for source, value in patterns.items()}
    for key in dict.fromkeys((*properties, *required)):
        matching = [value for source, value in patterns.items() if cache.of(source, place).contain(key)]
        if key in properties:
            properties[key] = _all_of([properties[key], *matching])
        elif matching:
            properties[key] = _all_of(matching)
    left = {}
    for source, value in patterns.items():
        keys = cache.of(source, place)
        if cache.any(place, [key for key in properties if keys.contain(key)], of=source):
            left[source] = value
    if result.get("additionalProperties", True) is not False and not cache.any(place, properties, outside=left):
        result["additionalProperties"] = False
    return left


def _bind_names(
    names: object,
    properties: dict[str, Any],
    patterns: dict[str, Any],
    result: dict[str, Any],
    required: list[str],
    place: Place,
    define: Define,
) -> None:
    """`propertyNames`, as far as the other keywords can say it: a list of names, or one pattern."""
    place /= "propertyNames"
    rest = result.get("additionalProperties", True)
    if names is True or names == {} or (rest is False and not patterns and not properties):
        return
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        raise place.found(names, "a schema for strings")
    asserted = set(names) & {"enum", "const", "pattern", "minLength", "maxLength", "format", "$ref", "not"}
    asserted |= set(names) & {"allOf", "anyOf", "oneOf", "if"}
    if not asserted:
        return
    if asserted <= {"enum", "const"} and len(asserted) == 1 and not patterns:
        listed = names["enum"] if "enum" in names else [names["const"]]
        if set(properties) <= set(map(str, listed)) >= set(required):
            shared = _shared(rest, define)
            for name in listed:
                if isinstance(name, str):
                    check_text(name, place)
                    properties.setdefault(name, shared)
            result["additionalProperties"] = False
            return
    if asserted == {"pattern"} and not patterns and not properties:
        patterns[pattern(names["pattern"], place)] = rest
        result["additionalProperties"] = False
        return
    raise place.found(names, "an enum, or a pattern beside neither properties nor patternProperties")


def _numbers_of_properties(schema: dict[str, Any], required: int, place: Place) -> dict[str, int]:
    result = counts(schema, place, "minProperties", "maxProperties")
    if result.get("minProperties", 0) > required + 1:
        # llguidance lets a key of additionalProperties come twice, and a reader counts it once.
        raise (place / "minProperties").found(
            result["minProperties"], f"at most {required + 1}, one more than required"
        )
    return result


def _shared(schema: Any, define: Define) -> Any:
    """The schema itself if it is small, a reference otherwise."""
    return schema if isinstance(schema, bool) or (len(schema) < 2 and "type" in schema) else define(schema)


def _all_of(parts: list[Any]) -> Any:
    parts = [part for part in parts if part is not True and part != {}]
    if not parts:
        return True
    return parts[0] if len(parts) == 1 else {"allOf": parts}


def _map(schema: dict[str, Any], keyword: str, place: Place) -> dict[str, Any]:
    value = schema.get(keyword, {})
    if not isinstance(value, dict):
        raise (place / keyword).found(value, "an object of schemas")
    return value


def _required(schema: dict[str, Any], place: Place) -> list[str]:
    value = schema.get("required", [])
    if isinstance(value, bool):  # draft 3 marked a property itself; no later draft knows that
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise (place / "required").found(value, "a list of names")
    return list(dict.fromkeys(value))
