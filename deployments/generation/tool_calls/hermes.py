"""Hermes and Qwen: `<tool_call>`, a JSON object with name and arguments, `</tool_call>`, for each call."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.generation.tool_calls.grammar import call_grammar, literal, repeated
from deployments.generation.tool_calls.json_reader import JsonReader
from deployments.generation.tool_calls.reader import NotACallError, Steps
from deployments.records import Grammar, Tool

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class HermesReader(JsonReader):
    special_tokens = (OPENING, CLOSING)
    opening = f"{OPENING}\n"

    @staticmethod
    def writes(template: str) -> bool:
        # Qwen3-Coder's calls have the same tag around XML.
        return OPENING in template and "<function=" not in template

    @classmethod
    def grammar(cls, tools: Sequence[Tool], parallel: bool) -> Grammar:
        end = literal(f"\n{CLOSING}")
        more = repeated(f"\n{CLOSING}\n{OPENING}\n") if parallel else ""
        return call_grammar(f"call {more} {end}", tools, "arguments")

    def message(self) -> Steps[None]:
        while marker := (yield from self.until(OPENING, CLOSING)):
            if marker == CLOSING:
                self.drop() if self._closes() else self.give()
                continue
            try:
                yield from self.space()
                yield from self.call_object(("arguments", "parameters"))
            except NotACallError:
                self.give()

    def _closes(self) -> bool:
        """Whether the closing tag, which is held, comes right behind a call."""
        return self._after_call and self._held.strip() == CLOSING
