"""JSON values as they come, and calls that are JSON objects with a name and arguments."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from typing import ClassVar

from deployments.generation.tool_calls.reader import SPACE, CallReader, NotACallError, Steps

Write = Callable[[str], None]

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
LETTERS = frozenset(string.ascii_letters)
HEX = frozenset(string.hexdigits)
ESCAPES = frozenset('"\\/bfnrt')
MAX_DEPTH = 64  # each level is a few generators deep


class JsonReader(CallReader):
    constants: ClassVar[Mapping[str, str]] = {"true": "true", "false": "false", "null": "null"}
    quotes: ClassVar[frozenset[str]] = frozenset('"')

    def call_object(self, argument_keys: tuple[str, ...]) -> Steps[None]:
        """Reads `{"name": ..., "arguments": {...}}`, the keys in any order, others ignored. Raises NotACallError for
        what is none; where the arguments were complete already, the call has ended all the same."""
        name: str | None = None
        arguments: str | None = None
        begun = False
        yield from self.one_of(("{",))
        while True:
            yield from self.space()
            key = yield from self._text()
            yield from self._separator()
            if key == "name" and name is None:
                name = self.known((yield from self._text()))
            elif key in argument_keys and not begun and arguments is None:
                if name is not None and (yield from self.peek()) == "{":
                    begun = True
                    yield from self.whole_call(name)
                else:
                    arguments = yield from self._arguments()
            else:
                yield from self.value(_ignore)
            yield from self.space()
            if (yield from self.one_of((",", "}"))) == "}":
                break
        if not begun:
            self.begin(self.known(name or ""))
            self.argument(arguments or "{}")
            self.finish()
        self.drop()

    def whole_call(self, name: str) -> Steps[None]:
        """Reads the arguments of a call of `name`, which begins and ends with them."""
        self.begin(name)
        yield from self._object(self.argument, 0)
        self.finish()

    def _arguments(self) -> Steps[str]:
        """An object, one in a string (some models write it so), or null."""
        parts: list[str] = []
        yield from self.value(parts.append)
        text = "".join(parts)
        try:
            value = json.loads(text)
            if isinstance(value, str):
                text, value = value, json.loads(value)
        except (ValueError, RecursionError):
            raise NotACallError from None
        if value is None:
            return "{}"
        if not isinstance(value, dict):
            raise NotACallError
        return text

    def _text(self) -> Steps[str]:
        parts: list[str] = []
        yield from self.string(parts.append)
        text: str = json.loads("".join(parts))
        return text

    def _separator(self) -> Steps[None]:
        yield from self.space()
        yield from self.one_of((":",))
        yield from self.space()

    def value(self, write: Write, depth: int = 0) -> Steps[None]:
        """Reads one value and writes it as JSON. Raises NotACallError at the first character that does not fit."""
        char = yield from self.peek()
        if depth > MAX_DEPTH:
            raise NotACallError
        if char == "{":
            yield from self._object(write, depth)
        elif char == "[":
            yield from self._array(write, depth)
        elif char in self.quotes:
            yield from self.string(write)
        elif char in LETTERS:
            constant = self.constants.get((yield from self.run_of(LETTERS)))
            if constant is None:
                raise NotACallError
            write(constant)
        else:
            number = yield from self.run_of(NUMBER_CHARACTERS)
            if not NUMBER.fullmatch(number):
                raise NotACallError
            write(number)

    def string(self, write: Write) -> Steps[None]:
        """A control character that a model forgot to escape is escaped here."""
        write((yield from self.one_of(('"',))))
        while True:
            char = yield from self.take()
            if not char:
                raise NotACallError
            if char == "\\":
                escape = yield from self.one_of(ESCAPES | {"u"})
                if escape == "u":
                    for _ in range(4):
                        escape += yield from self.one_of(HEX)
                write("\\" + escape)
            else:
                write(json.dumps(char)[1:-1] if char < " " else char)
                if char == '"':
                    return

    def _object(self, write: Write, depth: int) -> Steps[None]:
        write((yield from self.one_of(("{",))))
        yield from self._blank(write)
        if (yield from self.peek()) == "}":
            write((yield from self.take()))
            return
        while True:
            yield from self.string(write)
            yield from self._blank(write)
            write((yield from self.one_of((":",))))
            yield from self._blank(write)
            yield from self.value(write, depth + 1)
            yield from self._blank(write)
            char = yield from self.one_of((",", "}"))
            write(char)
            if char == "}":
                return
            yield from self._blank(write)

    def _array(self, write: Write, depth: int) -> Steps[None]:
        write((yield from self.one_of(("[",))))
        yield from self._blank(write)
        if (yield from self.peek()) == "]":
            write((yield from self.take()))
            return
        while True:
            yield from self.value(write, depth + 1)
            yield from self._blank(write)
            char = yield from self.one_of((",", "]"))
            write(char)
            if char == "]":
                return
            yield from self._blank(write)

    def _blank(self, write: Write) -> Steps[None]:
        while (yield from self.peek()) in SPACE:
            write((yield from self.take()))


def _ignore(text: str) -> None:
    pass
