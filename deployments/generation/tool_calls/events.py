"""What a form's reader makes of the text of an assistant's message."""

from __future__ import annotations

from typing import NamedTuple


class Content(NamedTuple):
    """Text that belongs to no call."""

    text: str


class CallBegun(NamedTuple):
    """The model calls the function `name`. Its arguments follow in pieces."""

    name: str


class ArgumentsPiece(NamedTuple):
    """A piece of the arguments, a JSON object, of the call that was begun last."""

    text: str


class CallEnded(NamedTuple):
    """The arguments are complete. A call without this event was cut off, or went on as no JSON."""


Event = Content | CallBegun | ArgumentsPiece | CallEnded
