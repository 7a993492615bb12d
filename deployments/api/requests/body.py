"""What all bodies of requests have in common: strict types, and fields that are left out where they change nothing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from deployments.api.requests.fields import BY_PLACE, EMPTY, Place

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Body(BaseModel):
    """A request's JSON object, or one inside it. `place`: what the table of fields calls it; None for one whose fields
    are all implemented."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    place: ClassVar[Place | None] = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, values: Any) -> Any:
        """Without the optional fields that are null, and those not implemented whose value changes nothing. A required
        one that is null stays, and is refused."""
        if not isinstance(values, dict):
            return values
        required = {field.alias or name: field.is_required() for name, field in cls.model_fields.items()}
        return {
            k: v
            for k, v in values.items()
            if (required[k] or v is not None if k in required else not neutral(cls, k, v))
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the fields that are not implemented and the values that are left out."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        required, properties = schema.get("required", ()), schema["properties"]
        for name, field in properties.items():
            if name not in required:
                properties[name] = or_null(field)
        for known in known_fields(cls).values():
            if known.neutral == "anything":
                properties[known.name] = {"description": f"Left out: {known.note}."}
            elif known.neutral is not None:
                properties[known.name] = {
                    "enum": [*EMPTY, *known.neutral],
                    "description": f"Not supported: {known.note}.",
                }
        schema["additionalProperties"] = {"enum": list(EMPTY)}
        return schema


class ModelBody(Body):
    model: str

    def check(self) -> None:
        """Raises InvalidRequestError for fields that do not go together."""


def known_fields(body_class: type[Body]) -> Any:
    return BY_PLACE[body_class.place] if body_class.place is not None else {}


def neutral(body_class: type[Body], name: str, value: Any) -> bool:
    """Whether a field that is not implemented is left out; one that nobody knows where it is empty."""
    field = known_fields(body_class).get(name)
    return any(value == each for each in EMPTY) if field is None else field.accepts(value)


def or_null(field: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an optional field: null is as left out."""
    if field.get("type") == "null":
        return field
    about: dict[str, Any] = {key: field[key] for key in ("title", "default", "description") if key in field}
    branches = field.get("anyOf") or [{key: value for key, value in field.items() if key not in about}]
    return {**about, "anyOf": [*branches, *([] if {"type": "null"} in branches else [{"type": "null"}])]}
