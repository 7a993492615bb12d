"""A completion's text as an assistant's message: pieces of its content and of its tool calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from dataclasses import replace

from deployments.generation.tool_calls.events import ArgumentsPiece, CallBegun, Content, Event
from deployments.generation.tool_calls.reader import CallReader
from deployments.records import GenerationChunk, MessagePiece, ToolCallPiece, ToolUse

# Mistral's templates want ids of this form; for the others any will do.
ID_CHARACTERS, ID_LENGTH = string.ascii_letters + string.digits, 9


class MessageReader:
    def __init__(self, form: type[CallReader], use: ToolUse) -> None:
        self._reader = form(use.names)
        self._parallel = use.parallel
        self._calls = 0  # begun
        self._ended = 0
        if use.forced:
            self._reader.add(form.opening)

    def skip(self, text: str) -> None:
        """Text whose pieces were given out elsewhere."""
        self._pieces(self._reader.add(text))

    def read(self, chunk: GenerationChunk) -> GenerationChunk:
        """The chunk with its piece of the message; the last one ends with the calls, where there are any."""
        events = self._reader.add(chunk.text)
        if chunk.finish_reason is not None:
            events += self._reader.end()
        message = self._pieces(events)
        called = chunk.finish_reason == "stop" and self._ended > 0
        return replace(chunk, message=message, finish_reason="tool_calls" if called else chunk.finish_reason)

    def _pieces(self, events: Sequence[Event]) -> MessagePiece:
        """What comes behind the first call is left out where there may be no second one."""
        content = ""
        calls: list[ToolCallPiece] = []
        for event in events:
            if self._ended and not self._parallel:
                break
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallBegun):
                calls.append(ToolCallPiece(self._calls, "", new_id(), event.name))
                self._calls += 1
            elif isinstance(event, ArgumentsPiece):
                calls.append(ToolCallPiece(self._calls - 1, event.text))
            else:
                self._ended += 1
        return MessagePiece(content, tuple(calls))


def new_id() -> str:
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
