"""What tests of the forms share: a message read whole, and in any pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from deployments.generation.tool_calls.events import ArgumentsPiece, CallBegun, CallEnded, Content, Event
from deployments.generation.tool_calls.reader import CallReader

NAMES = ("get_weather", "add", "now")


def read(form: type[CallReader], *pieces: str) -> list[Event]:
    """The events, those of one kind that follow each other as one."""
    reader = form(NAMES)
    events = [event for piece in pieces for event in reader.add(piece)] + reader.end()
    result: list[Event] = []
    for kind, group in groupby(events, type):
        if kind in (Content, ArgumentsPiece):
            result.append(kind("".join(event.text for event in group)))
        else:
            result += group
    return result


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def calls(events: Sequence[Event]) -> list[tuple[str, object]]:
    """The names and arguments of the calls that came to their end."""
    found: list[tuple[str, object]] = []
    name = arguments = ""
    for event in events:
        if isinstance(event, CallBegun):
            name, arguments = event.name, ""
        elif isinstance(event, ArgumentsPiece):
            arguments += event.text
        elif isinstance(event, CallEnded):
            found.append((name, json.loads(arguments)))
    return found
