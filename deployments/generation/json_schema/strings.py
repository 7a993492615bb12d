"""Strings and keys of a JSON schema: formats, patterns, and which keys patterns leave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from deployments.generation.json_schema.place import Place

# Of the formats that JSON Schema defines: those that llguidance keeps to, and those it does not know. JSON Schema calls
# any other format an annotation: it asserts nothing and is left out (password, int32, float, path, binary, …).
KEPT_FORMATS = ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
OTHER_FORMATS = (
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)

# Without \u escapes no key can be written in two ways. Control characters that have no short escape, and delete, are
# the price: no text has them.
UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
WRITABLE_PATTERN = r"^[^\x00-\x07\x0b\x0e-\x1f\x7f]*$"
ESCAPES = 'nrbtf\\"'

PROBE_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=50_000, max_lexer_states=5_000, verbose_errors=False
)
_BYTES = LLTokenizer("byte")


def check_text(text: str, place: Place) -> None:
    if UNWRITABLE.search(text):
        raise place.found(
            text, "text without half surrogate pairs and control characters other than \\b \\f \\n \\r \\t"
        )


def string_format(name: object, place: Place) -> str | None:
    """The format llguidance keeps to, None for an annotation."""
    if name in OTHER_FORMATS:
        raise place.found(name, f"one of {', '.join(KEPT_FORMATS)}, or none that JSON Schema defines")
    return str(name) if name in KEPT_FORMATS else None


def pattern(source: object, place: Place) -> str:
    """A pattern of JSON Schema (ECMA-262) in the syntax of llguidance (that of Rust's regex crate): the dot matches no
    line terminator, and in a class `[`, `&` and `~` stand for themselves."""
    if not isinstance(source, str):
        raise place.found(source, "a regular expression")
    result, in_class = "", False
    for token in re.findall(r"\\.|.", source, re.DOTALL):
        if in_class and token in "[&~":
            token = "\\" + token
        elif token in "[]":
            in_class = token == "["
        elif token == "." and not in_class:
            token = r"[^\n\r\u2028\u2029]"
        result += token
    return result


def may_need_unwritable(source: str) -> bool:
    r"""Whether all that the pattern matches might have characters that cannot be written: `[\x00-\x1f]`."""
    return bool(re.search(r"\\[xu0cav]|\\[pP]", source) or UNWRITABLE.search(source))


class Keys:
    """The keys that match a pattern of `patternProperties`. Raises InvalidRequestError for one llguidance refuses."""

    def __init__(self, source: str, place: Place) -> None:
        self._matcher = matcher({"type": "string", "pattern": source})
        if self._matcher.is_error():
            raise place.refusal(f"pattern {source:.100}: {said(self._matcher):.300}")

    def contain(self, key: str) -> bool:
        state, text = self._matcher.deep_copy(), json.dumps(key, ensure_ascii=False).encode()
        return state.try_consume_tokens(list(text)) == len(text) and state.is_accepting()


def any_key(without: Iterable[str], of: str | None = None, outside: Iterable[str] = ()) -> bool:
    """Whether some key that matches `of` (None: any) is none of `without` and matches none of `outside`. llguidance
    does not notice when there is none and comes to a dead end after a comma."""
    patterns = dict.fromkeys(outside, False) | ({of: True} if of is not None else {})
    state = matcher(
        {
            "type": "object",
            "properties": dict.fromkeys(without, False),
            "patternProperties": patterns,
            "additionalProperties": of is None,
        }
    )
    return state.try_consume_tokens(list(b'{"')) == 2


def said(matcher: LLMatcher) -> str:
    """What llguidance says against a grammar, empty if nothing."""
    return matcher.get_error().replace("<non-verbose/>", "").strip()


def matcher(schema: dict[str, object]) -> LLMatcher:
    """Follows a schema byte by byte, without a model."""
    options = {"whitespace_flexible": False, "json_allowed_escapes": ESCAPES}
    source = LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": options}))
    return LLMatcher(_BYTES, source, log_level=0, limits=PROBE_LIMITS)
