"""JSON schemas as common tools write them: pydantic, OpenAI's strict mode, zod (zod-to-json-schema and zod 4)."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, TypeAdapter


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Annotated[int, Field(gt=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog", "puppy"]
    weight: Annotated[float, Field(gt=0, lt=1)]


class Node(BaseModel):
    value: int
    children: list[Node] = []
    next: Node | None = None


class Owner(BaseModel):
    """All that a typical model has."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=20, description="Full name", examples=["Ada"])]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{3}$")]
    colour: Colour
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    others: list[Cat | Dog]
    scores: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=3)]
    point: tuple[int, float]
    by_name: dict[str, int] = {}
    by_colour: dict[Literal["red", "green"], bool] = {}
    by_code: dict[Annotated[str, Field(pattern="^[a-z]+$")], int] = {}
    price: Decimal
    step: Annotated[float, Field(multiple_of=0.25)]
    born: datetime.date
    seen: datetime.datetime | None = None
    lasts: datetime.timedelta
    id: uuid.UUID
    site: HttpUrl
    password: SecretStr
    anything: Any = None
    tree: Node


PYDANTIC: dict[str, dict[str, Any]] = {
    "pydantic model": Owner.model_json_schema(),
    "pydantic model as it writes": Owner.model_json_schema(mode="serialization"),
    "pydantic recursion": Node.model_json_schema(),
    "pydantic union": TypeAdapter(int | str | list[Cat] | None).json_schema(),
    "pydantic discriminated": TypeAdapter(Annotated[Cat | Dog, Field(discriminator="kind")]).json_schema(),
}

OPENAI_STRICT = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "final_answer": {"type": ["string", "null"]},
        "linked": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "unit": {"type": "string", "enum": ["F", "C"], "description": "Unit"},
        "mail": {"type": "string", "format": "email"},
        "amount": {"type": "number", "minimum": 0, "exclusiveMaximum": 100, "multipleOf": 0.5},
    },
    "$defs": {
        "step": {
            "type": "object",
            "properties": {"explanation": {"type": "string"}, "output": {"type": "string"}},
            "required": ["explanation", "output"],
            "additionalProperties": False,
        }
    },
    "required": ["steps", "final_answer", "linked", "unit", "mail", "amount"],
    "additionalProperties": False,
}
ZOD_3 = {
    "$ref": "#/definitions/User",
    "definitions": {
        "User": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                "age": {"type": "integer", "exclusiveMinimum": 0},
                "email": {"type": "string", "format": "email"},
                "pair": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": 2,
                    "items": [{"type": "string"}, {"type": "number"}],
                },
                "tags": {"type": "array", "items": {"type": "string"}, "default": []},
                "shape": {
                    "anyOf": [
                        {"type": "object", "properties": {"t": {"type": "string", "const": "a"}}, "required": ["t"]},
                        {"type": "object", "properties": {"t": {"type": "string", "const": "b"}}, "required": ["t"]},
                    ]
                },
                "record": {"type": "object", "additionalProperties": {"type": "number"}},
                "friend": {"$ref": "#/definitions/User/properties/email"},
            },
            "required": ["id", "age", "email", "pair", "shape"],
            "additionalProperties": False,
        }
    },
    "$schema": "http://json-schema.org/draft-07/schema#",
}
ZOD_4 = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        "positive": {"type": "number", "exclusiveMinimum": 0},
        "record": {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "number"}},
        },
        "shape": {
            "oneOf": [
                {"type": "object", "properties": {"t": {"type": "string", "const": x}}, "required": ["t"]} for x in "ab"
            ]
        },
        "mail": {
            "type": "string",
            "format": "email",
            "pattern": r"^(?:[A-Za-z0-9_'+\-]+)@([A-Za-z0-9]+\.)+[A-Za-z]{2,}$",
        },
        "nothing": {"not": {}},
        "both": {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
            ]
        },
    },
    "required": ["count", "positive", "record", "shape", "mail", "both"],
    "additionalProperties": False,
}
TOOLS: dict[str, dict[str, Any]] = PYDANTIC | {"OpenAI strict": OPENAI_STRICT, "zod 3": ZOD_3, "zod 4": ZOD_4}
