"""Llama 3: the message is a JSON object with name and parameters, or several behind semicolons; now and then behind
`<|python_tag|>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from deployments.generation.tool_calls.grammar import call_grammar, repeated
from deployments.generation.tool_calls.json_reader import JsonReader
from deployments.generation.tool_calls.reader import NotACallError, Steps
from deployments.records import Grammar, Tool

PYTHON_TAG = "<|python_tag|>"


class LlamaJsonReader(JsonReader):
    special_tokens: ClassVar[tuple[str, ...]] = (PYTHON_TAG,)

    @staticmethod
    def writes(template: str) -> bool:
        return '"parameters": dictionary of argument name' in template.replace("\\", "")

    @classmethod
    def grammar(cls, tools: Sequence[Tool], parallel: bool) -> Grammar:
        more = repeated("; ") if parallel else ""
        return call_grammar(f"call {more}", tools, "parameters")

    def message(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.peek()) == "{":
            yield from self._calls()
        while (yield from self.until(PYTHON_TAG)):
            yield from self.space()
            yield from self._calls()

    def _calls(self) -> Steps[None]:
        try:
            while True:
                yield from self.call_object(("parameters", "arguments"))
                yield from self.space()
                char = yield from self.peek()
                if char == ";":
                    yield from self.take()
                    yield from self.space()
                elif char != "{":
                    break
        except NotACallError:
            return
