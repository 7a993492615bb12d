"""Mistral: `[TOOL_CALLS]`, then a JSON list of objects with name and arguments; from tokenizer version 11 on, for each
call `[TOOL_CALLS]name{...}`, with `[CALL_ID]` and `[ARGS]` between them in some."""

from __future__ import annotations

import string
from collections.abc import Sequence

from deployments.generation.tool_calls.grammar import call_grammar, literal, repeated
from deployments.generation.tool_calls.json_reader import JsonReader
from deployments.generation.tool_calls.reader import NotACallError, Steps
from deployments.records import Grammar, Tool

OPENING, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME = frozenset(f"{string.ascii_letters}{string.digits}_.-")


class MistralReader(JsonReader):
    special_tokens = (OPENING, CALL_ID, ARGUMENTS)
    opening = OPENING

    @staticmethod
    def writes(template: str) -> bool:
        return OPENING in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], parallel: bool) -> Grammar:
        more = repeated(", ") if parallel else ""
        return call_grammar(f"{literal('[')} call {more} {literal(']')}", tools, "arguments")

    def message(self) -> Steps[None]:
        while (yield from self.until(OPENING)):
            try:
                yield from self.space()
                if (yield from self.peek()) == "[":
                    yield from self._list()
                else:
                    yield from self._named()
            except NotACallError:
                self.give()

    def _list(self) -> Steps[None]:
        yield from self.take()
        while True:
            yield from self.space()
            yield from self.call_object(("arguments",))
            yield from self.space()
            if (yield from self.one_of((",", "]"))) == "]":
                break
        self.drop()

    def _named(self) -> Steps[None]:
        name = self.known((yield from self.run_of(NAME)))
        yield from self.space()
        while (yield from self.peek()) == "[":
            yield from self._marker()
        if (yield from self.peek()) != "{":
            raise NotACallError
        yield from self.whole_call(name)

    def _marker(self) -> Steps[None]:
        marker = yield from self.take()
        while marker != CALL_ID and marker != ARGUMENTS:
            marker += yield from self.one_of({m[len(marker)] for m in (CALL_ID, ARGUMENTS) if m.startswith(marker)})
        if marker == CALL_ID:
            yield from self.run_of(NAME)
        yield from self.space()
