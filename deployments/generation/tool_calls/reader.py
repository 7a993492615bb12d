"""The base of all forms: characters in, events out.

A reader is a recursive descent over characters that have not all come yet: each step is a generator that yields where
it needs the next one. So its events depend on the text alone, never on the pieces in which the text comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence
from contextlib import suppress
from typing import ClassVar, TypeVar

from deployments.generation.tool_calls.events import ArgumentsPiece, CallBegun, CallEnded, Content, Event
from deployments.records import Grammar, Tool

T = TypeVar("T")
Steps = Generator[None, str, T]

SPACE = frozenset(" \t\r\n")


class NotACallError(Exception):
    """The text is no call, from the character that is looked at on."""


class CallReader(ABC):
    """One form of tool calls; an instance reads one message. Text is held back while it may belong to a call, and comes
    back as content where it does not."""

    special_tokens: ClassVar[tuple[str, ...]] = ()  # that have no text elsewhere, and here must
    opening: ClassVar[str] = ""  # what a forced call's prompt ends with; the reader has to read it first

    def __init__(self, names: Collection[str]) -> None:
        """`names` of the functions that may be called; what looks like a call of another one is content."""
        self._names = frozenset(names)
        self._events: list[Event] = []
        self._char: str | None = None  # that was looked at; "" is the end of the text
        self._held = ""
        self._after_call = False  # whether no content came since a call ended
        self._steps = self._read()
        next(self._steps)

    @staticmethod
    @abstractmethod
    def writes(template: str) -> bool:
        """Whether a model with this chat template was taught this form."""

    @classmethod
    @abstractmethod
    def grammar(cls, tools: Sequence[Tool], parallel: bool) -> Grammar:
        """Of a message, behind `opening`, that calls one of the tools; with `parallel` more than once, if at all."""

    @abstractmethod
    def message(self) -> Steps[None]:
        """Reads the message. What is left behind it is content."""

    def add(self, text: str) -> list[Event]:
        for char in text:
            self._steps.send(char)
        return self._taken()

    def end(self) -> list[Event]:
        """The text is complete. No `add` may follow."""
        with suppress(StopIteration):
            self._steps.send("")
        return self._taken()

    def _taken(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken

    def _read(self) -> Steps[None]:
        yield from self.message()
        yield from self.until()

    # What forms are written with.

    def peek(self) -> Steps[str]:
        """The next character, which stays; "" at the end of the text."""
        if self._char is None:
            self._char = yield
        return self._char

    def take(self) -> Steps[str]:
        """The next character, which is held from now on."""
        char = yield from self.peek()
        if char:
            self._char = None
            self._held += char
        return char

    def one_of(self, allowed: Collection[str]) -> Steps[str]:
        """Takes one of these characters. Raises NotACallError for any other."""
        if (yield from self.peek()) not in allowed:
            raise NotACallError
        return (yield from self.take())

    def run_of(self, allowed: Collection[str]) -> Steps[str]:
        """Takes as many of these characters as there are."""
        text = ""
        while (yield from self.peek()) in allowed:
            text += yield from self.take()
        return text

    def space(self) -> Steps[str]:
        return self.run_of(SPACE)

    def until(self, *markers: str) -> Steps[str]:
        """Gives the content before the first marker that comes, and returns the marker, which is held with the space
        before it; "" where none comes."""
        while True:
            char = yield from self.take()
            if not char:
                self.give()
                return ""
            found = next((marker for marker in markers if self._held.endswith(marker)), None)
            if found is not None:
                self.give(len(self._held[: -len(found)].rstrip()))
                return found
            if char not in SPACE:
                begun = max((_overlap(self._held, marker) for marker in markers), default=0)
                self.give(len(self._held[: len(self._held) - begun].rstrip()))

    def give(self, characters: int | None = None) -> None:
        """What is held, or its first characters, is content. Mere space behind a call is dropped."""
        text, self._held = (
            (self._held, "") if characters is None else (self._held[:characters], self._held[characters:])
        )
        if text and not (self._after_call and text.isspace()):
            self._after_call = False
            if self._events and isinstance(last := self._events[-1], Content):
                self._events[-1] = Content(last.text + text)
            else:
                self._events.append(Content(text))

    def drop(self) -> None:
        """What is held was a part of a call's form."""
        self._held = ""

    def begin(self, name: str) -> None:
        self.drop()
        self._after_call = False
        self._events.append(CallBegun(name))

    def argument(self, text: str) -> None:
        """What was held became this piece of the arguments."""
        self.drop()
        if self._events and isinstance(last := self._events[-1], ArgumentsPiece):
            self._events[-1] = ArgumentsPiece(last.text + text)
        else:
            self._events.append(ArgumentsPiece(text))

    def finish(self) -> None:
        self._after_call = True
        self._events.append(CallEnded())

    def known(self, name: str) -> str:
        if name not in self._names:
            raise NotACallError
        return name


def _overlap(text: str, marker: str) -> int:
    """How long the longest end of `text` is that begins `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
