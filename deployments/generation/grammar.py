"""Structured output: what the text of a completion must look like, and the tokens that keep it so."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from cluster.checkpoints.tokenizer.files import FileTokenizer
from cluster.errors import InvalidRequestError
from deployments.engines.base import Logits, TokenMask
from deployments.generation.json_schema import Rewritten, rewritten, strings
from deployments.generation.json_schema.strings import ESCAPES, said
from deployments.records import Grammar

# A client writes schemas and grammars: what llguidance may spend on one is bounded, in all and for each token. The most
# expensive texts within these bounds take about a second to compile and some tens of megabytes.
MAX_CHARACTERS = {"json_schema": 64 * 1024, "grammar": 16 * 1024, "tool_calls": 64 * 1024}
MAX_GBNF_RULES = 500  # converting them to Lark takes time that is quadratic in their number
LIMITS = LLParserLimits(
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=20_000,
    verbose_errors=False,  # what it says goes to the client
)
# llguidance follows references recursively, and a stack that overflows takes the replica with it. Within the bounds on
# a text, the deepest chain of references needs less than this; untouched pages of a stack cost nothing.
STACK_BYTES = 256 * 1024 * 1024
CACHED_GRAMMARS = 8

# One optional space where people write one and nowhere else: JSON stays finite between its values, as a small model
# likes to write white space without end, and each model can use the tokens (`": "`, `":`) it knows best.
# No \u escapes: one could be half a surrogate pair, or write a key a second time in another way.
JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": ESCAPES,
}
# After 'A:' a text begins with a space more likely than not. JSON allows it, and so that grammar does.
JSON_START = 'start: " "? @value'

_STACK_SIZE_LOCK = threading.Lock()


class GrammarCompiler:
    """Grammars for one model's tokens. Compiled ones are kept, the latest few; any thread may call `mask`."""

    def __init__(self, tokenizer: FileTokenizer, eos_ids: frozenset[int]) -> None:
        known = frozenset(tokenizer.vocabulary().values())
        size = 1 + max(known | eos_ids)
        source = tokenizer.grammar_source()
        self._tokenizer = LLTokenizer(
            source if isinstance(source, str) else TokenizerWrapper(source),
            n_vocab=size,
            eos_token=sorted(eos_ids & known) or None,
        )
        self._eos_ids = eos_ids
        # Special tokens never, not even where a grammar names them; and no token that llguidance reads in another way.
        self._text_tokens = np.array(
            [bool(text := tokenizer.token_bytes(i)) and self._tokenizer.decode_bytes([i]) == text for i in range(size)]
        )
        self._text_tokens[sorted(eos_ids)] = False
        self._matcher = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    def mask(self, grammar: Grammar) -> TokenMask:
        """A mask at the beginning of a text, for one sequence. Raises InvalidRequestError for what llguidance refuses,
        for a grammar that allows no text at all and for a model without an end token."""
        if not self._eos_ids:
            raise InvalidRequestError(
                f"{grammar.field}: this model has no end token, so that no text could be complete", field=grammar.field
            )
        return _Mask(self._matcher(grammar).deep_copy(), self._text_tokens, self._eos_ids, grammar.field)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        allowed = MAX_CHARACTERS[grammar.kind]
        if len(grammar.text) > allowed:
            raise InvalidRequestError(
                f"{grammar.field}: found {len(grammar.text)} characters, allowed are {allowed}", field=grammar.field
            )
        if grammar.kind == "grammar":
            return _on_deep_stack(lambda: self._built(_from_grammar(grammar), grammar.field))
        if grammar.kind == "tool_calls":
            return _on_deep_stack(partial(self._tool_calls, grammar))
        schema = _from_schema(grammar)

        def build() -> LLMatcher:
            try:
                return self._built(with_style(schema.schema), grammar.field)
            except InvalidRequestError as error:
                said = str(error).removeprefix(f"{grammar.field}: ")
                raise schema.place_of(said, _complaint).refusal(said) from error

        return _on_deep_stack(build)

    def _tool_calls(self, grammar: Grammar) -> LLMatcher:
        calls = json.loads(grammar.text)
        schemas = [rewritten(schema, f"{grammar.field}.{tool}.parameters") for tool, schema in calls["schemas"]]
        values = {f"arguments{index}": each.schema for index, each in enumerate(schemas)}
        try:
            return self._built(embedded(calls["rules"], values), grammar.field)
        except InvalidRequestError:
            for each in schemas:
                if complaint := _complaint(each.schema):
                    raise each.place_of(complaint, _complaint).refusal(complaint) from None
            raise

    def _built(self, source: str, field: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        # The first mask shows what compiling does not: rules that lead nowhere, and what is too expensive to use.
        _Mask(matcher, self._text_tokens, self._eos_ids, field).allowed()
        return matcher


class _Mask:
    def __init__(
        self, matcher: LLMatcher, text_tokens: npt.NDArray[np.bool_], eos_ids: frozenset[int], field: str
    ) -> None:
        self._matcher = matcher
        self._text_tokens = text_tokens
        self._eos_ids = eos_ids
        self._eos_list = sorted(eos_ids)
        self._field = field
        self._ended = False

    def apply(self, logits: Logits) -> None:
        """Raises InvalidRequestError where nothing may follow, or finding out takes more than LIMITS allow."""
        allowed = self.allowed()[: len(logits)]
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf  # ids that pad the model's vocabulary

    def accept(self, token: int) -> None:
        if token in self._eos_ids:
            self._ended = True
        elif not self._matcher.consume_token(token):
            raise self._refusal()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """By token id."""
        if self._ended or self._complete():
            allowed = np.zeros_like(self._text_tokens)
            allowed[self._eos_list] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._refusal()
        allowed = np.unpackbits(bits, count=len(self._text_tokens), bitorder="little").view(np.bool_)
        allowed &= self._text_tokens
        if self._matcher.is_accepting() and not self._matcher.is_stopped():
            allowed[self._eos_list] = True
        if not allowed.any():
            raise InvalidRequestError(
                f"{self._field}: the grammar leads to where no token of this model may follow, nor the end",
                field=self._field,
            )
        return allowed

    def _complete(self) -> bool:
        return self._matcher.is_stopped() and self._matcher.stop_reason() == "NoExtension"

    def _refusal(self) -> InvalidRequestError:
        return InvalidRequestError(f"{self._field}: {said(self._matcher)[:500]}", field=self._field)


def _from_schema(grammar: Grammar) -> Rewritten:
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{grammar.field}: not JSON: {error}", field=grammar.field) from error
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{grammar.field}: found {schema!r:.100}, allowed is an object", field=grammar.field)
    return rewritten(schema, grammar.field)


def with_style(schema: dict[str, Any]) -> str:
    return embedded(JSON_START, {"value": schema})


def embedded(rules: str, schemas: dict[str, dict[str, Any]]) -> str:
    """Rules in Lark's syntax, in which `@name` is a JSON value of the schema of this name."""
    values = [{"name": name, "json_schema": schema | {"x-guidance": JSON_STYLE}} for name, schema in schemas.items()]
    return json.dumps({"grammars": [{"lark_grammar": rules}, *values]})


def _complaint(schema: dict[str, Any]) -> str:
    """What llguidance says against a schema, empty if nothing."""
    return said(strings.matcher(schema))[:500]


def _from_grammar(grammar: Grammar) -> str:
    rules = grammar.text.count("::=")
    if rules > MAX_GBNF_RULES:
        raise InvalidRequestError(
            f"{grammar.field}: found {rules} rules, allowed are {MAX_GBNF_RULES}", field=grammar.field
        )
    try:
        lark = any_to_lark(_unescaped(grammar.text) if rules else grammar.text)
        lark.encode()
    except Exception as error:  # the converter raises bare Exception
        raise InvalidRequestError(f"{grammar.field}: {str(error)[:500]}", field=grammar.field) from error
    return LLMatcher.grammar_from_lark(lark)


def _unescaped(gbnf: str) -> str:
    r"""Without \u and \U escapes beyond ASCII, which any_to_lark of llguidance 1.9 turns into what Lark refuses."""

    def character(escape: re.Match[str]) -> str:
        digits = escape[1]
        return chr(int(digits, 16)) if digits and 0x80 <= int(digits, 16) <= 0x10FFFF else escape[0]

    return re.sub(r"\\(?:[uU]((?<=u)[0-9a-fA-F]{4}|(?<=U)[0-9a-fA-F]{8})|.)", character, gbnf)


def _on_deep_stack(build: Callable[[], LLMatcher]) -> LLMatcher:
    """What `build` returns or raises, run in a thread with a stack of STACK_BYTES."""
    result: list[LLMatcher] = []
    refusal: list[InvalidRequestError] = []

    def run() -> None:
        try:
            result.append(build())
        except InvalidRequestError as error:
            refusal.append(error)

    thread = threading.Thread(target=run, name="grammar")
    with _STACK_SIZE_LOCK:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if refusal:
        raise refusal[0]
    return result[0]
