"""Random JSON schemas that use every keyword, many of them in combinations that nobody would write."""

from __future__ import annotations

import random
from typing import Any

BOUNDS = [0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2, 3, 7, 10, 0.1, 0.3, 0.35, -2.5, 100, 2.0, 9.75, 99, 101, 0.07]
EXTREME = [1e10, 1e17, 2**53 + 1, 1e300, 1e-300, 0.30000000000000004]
KEYS = ["a", "b", "ab", "é", "", "a/b", "x~y", "b1"]
PATTERNS = ["^a", "b$", "^a$", "[0-9]+", "^(a|b)$", ".", "^.*$", "^[^a]*$", "é", "^a|b$", "^x?$"]
STRINGS = [*PATTERNS, r"^\d+$", r"^\w{2}$", "[\\x00-\\x03]", "^[a&b[]$"]
CONSTANTS = [1, 1.0, 0, -0.0, "a", "", None, True, [1], {"a": 1}, {"b": "é"}, 0.1, "x\ny", 2.5, 10]
TYPES = ["integer", "number", "string", "array", "object", "boolean", "null"]
UNIONS: list[Any] = [None, ["integer", "null"], ["string", "number"], ["integer", "number"]]
NAMES = ("n", "m")


class RandomSchemas:
    """Schemas from one seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._references = self._draw.random() < 0.4

    def root(self) -> dict[str, Any]:
        schema = self.schema(3)
        schema = schema if isinstance(schema, dict) else {"allOf": [schema]}
        return schema | {"$defs": {name: self.schema(2) for name in NAMES}} if self._references else schema

    def schema(self, depth: int) -> Any:
        draw = self._draw
        if self._rarely(0.05):
            return draw.choice([True, True, False, {}])
        schema: dict[str, Any] = {}
        if self._references and self._rarely(0.08):
            schema["$ref"] = f"#/$defs/{draw.choice(NAMES)}"
        if self._rarely(0.12):
            schema |= draw.choice([{"enum": draw.sample(CONSTANTS, 3)}, {"const": draw.choice(CONSTANTS)}])
        if schema and self._rarely(0.75):
            return schema
        types = draw.choice([*TYPES, *UNIONS] if depth else TYPES[:3])
        schema |= {"type": types} if types else {}
        for name in types if isinstance(types, list) else [types or "object", "number", "string", "array"]:
            schema |= self._keywords(name, depth)
            if isinstance(types, str):
                break
        if depth:
            schema |= self._combinations(depth)
        keywords = list(schema.items())
        draw.shuffle(keywords)
        return dict(keywords)

    def _rarely(self, chance: float) -> bool:
        return self._draw.random() < chance

    def _keywords(self, name: str, depth: int) -> dict[str, Any]:
        draw, some = self._draw, self._draw.choice
        chances: dict[str, tuple[float, Any]] = {}
        if name in ("integer", "number"):
            for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                chances[keyword] = 0.3, lambda: some(EXTREME if self._rarely(0.1) else BOUNDS)
            chances["multipleOf"] = 0.2, lambda: some([1, 2, 0.5, 0.1, 3, 0.25, 7, 2.5, 100])
        elif name == "string":
            chances["minLength"] = 0.3, lambda: some([0, 1, 2, 2.0, 5])
            chances["maxLength"] = 0.3, lambda: some([0, 1, 3, 6])
            chances["pattern"] = 0.2, lambda: some(STRINGS)
            chances["format"] = 0.1, lambda: some(["date", "uuid", "password", "ipv4", "email"])
        elif name == "array" and depth:
            chances["items"] = 0.6, lambda: self.schema(depth - 1)
            chances["prefixItems"] = 0.3, lambda: [self.schema(depth - 1) for _ in range(draw.randint(1, 2))]
            chances["minItems"] = 0.4, lambda: draw.randint(0, 3)
            chances["maxItems"] = 0.3, lambda: draw.randint(0, 3)
            chances["uniqueItems"] = 0.04, lambda: some([True, False])
            chances["contains"] = 0.02, lambda: self.schema(depth - 1)
        elif name == "object" and depth:
            chances["properties"] = 0.7, lambda: self._map(KEYS, draw.randint(1, 3), depth)
            chances["required"] = 0.4, lambda: draw.sample(KEYS, draw.randint(0, 2))
            chances["additionalProperties"] = 0.5, lambda: some([False, self.schema(depth - 1)])
            chances["patternProperties"] = 0.25, lambda: self._map(PATTERNS, some([1, 1, 1, 2]), depth)
            chances["minProperties"] = 0.1, lambda: draw.randint(0, 2)
            chances["maxProperties"] = 0.1, lambda: draw.randint(0, 2)
            chances["propertyNames"] = 0.1, lambda: some([{"enum": ["a", "é"]}, {"pattern": "^a"}, {"minLength": 1}])
            chances["dependentRequired"] = 0.02, lambda: {"a": ["b"]}
        return {keyword: make() for keyword, (chance, make) in chances.items() if self._rarely(chance)}

    def _map(self, keys: list[str], count: int, depth: int) -> dict[str, Any]:
        return {key: self.schema(depth - 1) for key in self._draw.sample(keys, count)}

    def _combinations(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for keyword in ("anyOf", "oneOf", "allOf"):
            if self._rarely(0.09):
                schema[keyword] = [self.schema(depth - 1) for _ in range(self._draw.randint(1, 3))]
        if self._rarely(0.02):
            schema["not"] = self.schema(depth - 1)
        if self._rarely(0.02):
            schema |= {"if": True, "then": self.schema(depth - 1)}
        return schema
