"""A request's JSON to its record of `deployments/api/schema.py`, and that record's entry in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.errors import InvalidRequestError
from deployments.api.schema import Body, ModelBody

B = TypeVar("B", bound=ModelBody)

# What the errors of a union, one a branch, would say at length.
TOKENS_OR_TEXT = "a string, a list of strings, token ids, or a list of lists of token ids"
FORMS = {
    "prompt": TOKENS_OR_TEXT,
    "input": TOKENS_OR_TEXT,
    "content": "a string or a list of parts {type: text, text: a string}",
}


def parse(body_class: type[B], body: Any) -> B:
    """Raises InvalidRequestError for the first field that is wrong: its name, what was found, what is allowed."""
    if not isinstance(body, dict):
        raise InvalidRequestError(f"body: found {type(body).__name__}, expected a JSON object")
    try:
        parsed = body_class.model_validate(without_nulls(body_class, body))
    except ValidationError as error:
        raise invalid_field(body_class, error) from None
    parsed.check()
    return parsed


def without_nulls(body_class: type[Body], body: dict[str, Any]) -> dict[str, Any]:
    """Without the optional fields that are null; one that is required, or unknown, stays and is refused."""
    fields = body_class.model_fields
    return {k: v for k, v in body.items() if v is not None or k not in fields or fields[k].is_required()}


def invalid_field(body_class: type[Body], error: ValidationError) -> InvalidRequestError:
    detail = error.errors()[0]
    # pydantic's mark of a name in a mapping, rather than its value, is no part of a field's name.
    location = [part for part in detail["loc"] if part != "[key]"]
    kind, found = detail["type"], shorten(detail["input"])
    for depth, part in enumerate(location[:-1], 1):
        if part in FORMS:
            field = dotted(location[:depth])
            return InvalidRequestError(f"{field}: found {found}; allowed are {FORMS[str(part)]}", field)
    field = dotted(location) or "body"
    if kind == "extra_forbidden":
        allowed = f"; allowed are {', '.join(body_class.model_fields)}" if len(location) == 1 else ""
        return InvalidRequestError(f"{field}: not supported{allowed}", field)
    if kind == "missing":
        return InvalidRequestError(f"{field}: missing, but required", field)
    if kind == "none_required":
        return InvalidRequestError(f"{field}: not supported by this server; leave it out", field)
    return InvalidRequestError(f"{field}: found {found}; {detail['msg'][0].lower()}{detail['msg'][1:]}", field)


def dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def body_schema(body_class: type[Body]) -> dict[str, Any]:
    """The JSON schema of a body, its definitions inside. As `parse` has it, optional fields may be null."""
    schema = body_class.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and field.get("type") != "null":
            branches = field.pop("anyOf", None) or [
                {k: field.pop(k) for k in list(field) if k not in ("title", "default", "description")}
            ]
            field["anyOf"] = [*branches, *([] if {"type": "null"} in branches else [{"type": "null"}])]
    return schema
