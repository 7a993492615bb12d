"""Texts that a grammar allows, drawn byte by byte, and a validator to judge them by."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import jsonschema
import numpy as np
from llguidance import LLMatcher, LLTokenizer

from deployments.generation.grammar import LIMITS, with_style
from deployments.generation.json_schema import rewritten

_BYTES = LLTokenizer("byte")
SOON = 120  # bytes after which what closes values is preferred
CLOSING, BOUNDS = b'"}]', b'0-.,"9\\'


class _Number(float):
    """A double that knows how it was written: of a long fraction, the double need not be a multiple."""

    written: str

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = written
        return number


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """jsonschema's own divides doubles: 0.3 is no multiple of 0.1."""
    written = getattr(value, "written", str(value))
    if validator.is_type(value, "number") and Fraction(written) % Fraction(str(step)):
        yield jsonschema.ValidationError(f"{written} is not a multiple of {step}")


@cache
def _exact(judge: Any) -> Any:
    """This class of jsonschema's with an exact `multipleOf`."""
    return jsonschema.validators.extend(judge, {"multipleOf": _multiple_of})


def _python(source: str) -> str:
    """A pattern of ECMA-262 as Python's `re` reads it: there the dot matches three line terminators more, and `$` also
    stands before a last line feed."""
    result, in_class = "", False
    for token in re.findall(r"\\.|.", source, re.DOTALL):
        in_class = token == "[" or (in_class and token != "]")
        result += {".": r"[^\n\r\u2028\u2029]", "$": r"\Z"}.get(token, token) if not in_class else token
    return result


def _with_python_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_python_patterns(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _with_python_patterns(value) for key, value in schema.items()}
    if isinstance(result.get("pattern"), str):
        result["pattern"] = _python(result["pattern"])
    if isinstance(patterns := result.get("patternProperties"), dict):
        result["patternProperties"] = {_python(source): value for source, value in patterns.items()}
    return result


def check(schema: dict[str, Any], text: bytes) -> None:
    """Raises jsonschema.ValidationError, or ValueError for what is not JSON, where `text` violates `schema`."""
    judge = _exact(jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator))
    value = json.loads(text, parse_float=_Number)
    with contextlib.suppress(RecursionError):  # a $ref to itself, which JSON Schema leaves undefined
        judge(_with_python_patterns(schema)).validate(value)


def compiled(schema: dict[str, Any]) -> LLMatcher:
    """Raises InvalidRequestError for what is refused by nibble; `is_error` of the result tells llguidance's refusal."""
    matcher = LLMatcher(_BYTES, with_style(rewritten(schema, "response_format").schema), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    return matcher


def allows(schema: dict[str, Any], text: str) -> bool:
    matcher, tokens = compiled(schema), list(text.encode())
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def write(matcher: LLMatcher, seed: int) -> bytes | None:
    """A text that the grammar allows; None for one that is not whole when it is long. Every third seed draws bytes
    evenly, the others prefer those that end values early, and digits at bounds. Fails at a dead end."""
    draw, state, text = random.Random(seed), matcher.deep_copy(), bytearray()
    preferred = (b"", CLOSING + b",", BOUNDS)[seed % 3]
    while len(text) < 3 * SOON:
        bits = state.compute_bitmask()
        assert not state.is_error(), f"dead end after {bytes(text)!r}: {state.get_error():.80}"
        mask = np.unpackbits(np.frombuffer(bits, np.uint8, 256 // 8), bitorder="little")
        allowed = np.flatnonzero(mask).tolist()
        assert allowed or state.is_accepting(), f"dead end after {bytes(text)!r}"
        if state.is_accepting() and (not allowed or draw.random() < 0.3):
            return bytes(text)
        wanted = CLOSING if len(text) > SOON else preferred if draw.random() < 0.6 else b""
        byte = draw.choice([byte for byte in allowed if byte in wanted] or allowed)
        state.consume_token(byte)
        text.append(byte)
    return None
