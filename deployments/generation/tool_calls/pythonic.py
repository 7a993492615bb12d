"""Llama 3.2 and 4: the message is a Python list of calls, `[get_weather(city="Paris"), now()]`."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import ClassVar

from deployments.generation.tool_calls.json_reader import HEX, Write
from deployments.generation.tool_calls.llama_json import LlamaJsonReader
from deployments.generation.tool_calls.reader import NotACallError, Steps

NAME = frozenset(f"{string.ascii_letters}{string.digits}_.-")
ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0", "\n": ""}
CODES = {"x": 2, "u": 4, "U": 8}  # hexadecimal digits


class PythonicReader(LlamaJsonReader):
    """A forced call is JSON, which these models write too: its arguments can be held to their schema."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[Mapping[str, str]] = {
        **LlamaJsonReader.constants,
        "True": "true",
        "False": "false",
        "None": "null",
    }
    quotes = frozenset("\"'")

    @staticmethod
    def writes(template: str) -> bool:
        return "[func_name1(" in template

    def message(self) -> Steps[None]:
        yield from self.space()
        char = yield from self.peek()
        if char == "{":
            yield from self._calls()
        elif char == "[":
            try:
                yield from self._list()
            except NotACallError:
                self.give()

    def _list(self) -> Steps[None]:
        yield from self.take()
        while True:
            yield from self.space()
            name = self.known((yield from self.run_of(NAME)))
            yield from self.one_of(("(",))
            self.begin(name)
            yield from self._keywords()
            self.finish()
            yield from self.space()
            if (yield from self.one_of((",", "]"))) == "]":
                break
        self.drop()

    def _keywords(self) -> Steps[None]:
        """The arguments, to the closing bracket, written as a JSON object."""
        start = "{"
        yield from self.space()
        while (yield from self.peek()) != ")":
            key = yield from self.run_of(NAME)
            yield from self.space()
            yield from self.one_of(("=",))
            yield from self.space()
            if not key:
                raise NotACallError
            self.argument(f"{start}{json.dumps(key)}: ")
            yield from self.value(self.argument)
            yield from self.space()
            start = ", "
            if (yield from self.peek()) != ")":
                yield from self.one_of((",",))
                yield from self.space()
        yield from self.take()
        self.argument("{}" if start == "{" else "}")

    def string(self, write: Write) -> Steps[None]:
        """Python's, written as JSON's."""
        quote = yield from self.one_of(self.quotes)
        write('"')
        while True:
            char = yield from self.take()
            if not char:
                raise NotACallError
            if char == quote:
                write('"')
                return
            if char == "\\":
                char = yield from self._escaped()
            write(_in_json(char))

    def _escaped(self) -> Steps[str]:
        char = yield from self.take()
        if not char:
            raise NotACallError
        if char not in CODES:
            # A backslash before any other character stands for itself.
            return ESCAPES.get(char, char if char in "\\\"'" else f"\\{char}")
        digits = ""
        for _ in range(CODES[char]):
            digits += yield from self.one_of(HEX)
        code = int(digits, 16)
        if code > 0x10FFFF:
            raise NotACallError
        return chr(code)


def _in_json(text: str) -> str:
    """Within a string; half a surrogate pair as an escape, since UTF-8 has none."""
    return json.dumps(text, ensure_ascii=any("\ud800" <= char <= "\udfff" for char in text))[1:-1]
