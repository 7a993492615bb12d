"""`python -m tests.fields_page` (`make docs`) writes docs/reference/fields.md from the table that the parser reads."""

from __future__ import annotations

from pathlib import Path

from deployments.api.requests.fields import ANYTHING, FIELDS, Api, Field, as_json

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "fields.md"

ABOUT = """# Fields of requests

What becomes of OpenAI's and vLLM's fields. This page is made from `deployments/api/requests/fields.py` by `make docs`.

- A field that is **implemented** does what its API says.
- A field that is **left out** changes no answer of nibble's with the values named here. Any other value of it is
  refused with 400, and the error names the field and what is allowed.
- `null` is left out wherever a field is optional, at every depth; so is an empty list in a field that is not
  implemented. Both hold for fields that nobody knows, too.
- Any other value of a field that is not on this page is refused, so that a typing error is seen.

`messages[]` is a message of a chat, `content[]` a part of its content. `responses` is POST /v1/responses, `text` and
`reasoning` its fields of these names; items are those of its `input`, an input part is one of their content.
gRPC's fields are in `protos/inference.proto`.
"""
APIS: tuple[Api, ...] = ("OpenAI", "vLLM", "nibble")


def page() -> str:
    return "\n".join([ABOUT, *(section for api in APIS for section in sections(api))])


def sections(api: Api) -> list[str]:
    fields = [field for field in FIELDS if field.api == api]
    done = [field for field in fields if field.neutral is None]
    others = [field for field in fields if field.neutral is not None]
    lines = [f"## {api}\n", "| in | implemented |", "|---|---|"]
    for places in dict.fromkeys(field.places for field in done):
        names = ", ".join(f"`{field.name}`" for field in done if field.places == places)
        lines.append(f"| {', '.join(places)} | {names} |")
    if others:
        lines += ["", "| field | in | left out with | why |", "|---|---|---|---|", *map(row, others)]
    return [*lines, ""]


def row(field: Field) -> str:
    if field.neutral == ANYTHING:
        values = "any value"
    else:
        values = ", ".join(f"`{as_json(value)}`" for value in field.neutral or ()) or "null only"
    return f"| `{field.name}` | {', '.join(field.places)} | {values} | {field.note} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
