"""A request's JSON to its record of `schema.py`, and that record's entry in the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.errors import InvalidRequestError
from deployments.api.requests.body import Body, ModelBody
from deployments.api.requests.fields import BY_PLACE, Field, Place

B = TypeVar("B", bound=ModelBody)

# What the errors of a union, one a branch, would say at length.
TOKENS_OR_TEXT = "a string, a list of strings, token ids, or a list of lists of token ids"
PARTS = "a string or a list of parts {type: text, text: a string}"
INPUT_PARTS = "a string or a list of parts {type: input_text or output_text, text: a string}"
FORMS: dict[Place | None, dict[str, str]] = {
    "completions": {"prompt": TOKENS_OR_TEXT},
    "embeddings": {"input": TOKENS_OR_TEXT},
    "chat": {
        "content": PARTS,
        "tool_choice": "none, auto, required, {type: function, function: {name: one of the tools}} and {type:"
        " allowed_tools, allowed_tools: {mode: auto or required, tools: a list of such}}",
    },
    "tokenize": {"content": PARTS},
    "responses": {
        "content": INPUT_PARTS,
        "output": INPUT_PARTS,
        "tool_choice": "none, auto, required, {type: function, name: one of the tools} and {type: allowed_tools, mode:"
        " auto or required, tools: a list of such}",
    },
}

# Where an object inside a body stands in the table of fields.
PLACES: dict[str, Place] = {
    "messages": "messages[]",
    "stream_options": "stream_options",
    "structured_outputs": "structured_outputs",
    "text": "text",
    "reasoning": "reasoning",
}

BRACKETED = re.compile(r"\[[a-z_]+\]")


def parse(body_class: type[B], body: Any) -> B:
    """Raises InvalidRequestError for the first field that is wrong: its name, what was found, what is allowed."""
    if not isinstance(body, dict):
        raise InvalidRequestError(f"body: found {type(body).__name__}, expected a JSON object")
    try:
        parsed = body_class.model_validate(body)
    except ValidationError as error:
        raise invalid_field(body_class, error) from None
    parsed.check()
    return parsed


def strict_json(text: str | bytes) -> Any:
    """Raises ValueError or RecursionError for what is no JSON; NaN and Infinity are none."""
    return json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def invalid_field(body_class: type[Body], error: ValidationError) -> InvalidRequestError:
    detail = error.errors()[0]
    # What is in brackets is no part of a field's name: pydantic's mark of a name in a mapping, rather than its value,
    # and the kind of an item.
    location = [part for part in detail["loc"] if not BRACKETED.fullmatch(str(part))]
    forms = FORMS.get(body_class.place, {})
    kind, found = detail["type"], shorten(detail["input"])
    for depth, part in enumerate(location[:-1], 1):
        if part in forms:
            field = dotted(location[:depth])
            return InvalidRequestError(f"{field}: found {found}; allowed are {forms[str(part)]}", field)
    field = dotted(location) or "body"
    if kind == "extra_forbidden":
        known = known_field(body_class, location)
        if known is not None:
            return InvalidRequestError(f"{field}: found {found}, {known.refusal}", field)
        allowed = f"; allowed are {', '.join(body_class.model_fields)}" if len(location) == 1 else ""
        return InvalidRequestError(f"{field}: not supported{allowed}", field)
    if kind == "missing":
        return InvalidRequestError(f"{field}: missing, but required", field)
    return InvalidRequestError(f"{field}: found {found}; {detail['msg'][0].lower()}{detail['msg'][1:]}", field)


def known_field(body_class: type[Body], location: Sequence[int | str]) -> Field | None:
    """The field at this place in the table of fields."""
    inside = next((part for part in reversed(location[:-1]) if isinstance(part, str)), None)
    place = body_class.place if inside is None else PLACES.get(inside)
    return None if place is None else BY_PLACE[place].get(str(location[-1]))


def dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def body_schema(body_class: type[Body]) -> dict[str, Any]:
    """The JSON schema of a body, its definitions inside."""
    return body_class.model_json_schema(ref_template="#/components/schemas/{model}")
