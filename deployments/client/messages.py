"""What the client's requests and answers are, whichever protocol carries them. Answers compare equal over both; what
each request has of its own (its id, its time) does not count."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.errors import InvalidRequestError, NibbleError, RetryLaterError
from deployments.records import ToolCallPiece

Prompt = str | Sequence[int] | Sequence[str | Sequence[int]]
Messages = Sequence[Mapping[str, Any]]
REQUEST_ID = "x-request-id"


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """`token`: its text, or `bytes:` and escapes for a part of a character. `logprob` is None for a prompt's first
    token. `top`: the most likely texts at its place. `text_offset` is None in a chat."""

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    text_offset: int | None


@dataclass(frozen=True)
class Choice:
    """`tool_calls`: each in one piece."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallPiece, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, as a chat's `messages` take it."""
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text}
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}


@dataclass(frozen=True)
class Piece(Choice):
    """Of one choice of a stream; its last piece has a finish_reason. `tool_calls`: a call's first piece has its id and
    name, the following ones more of the arguments."""


def says_something(piece: Piece) -> bool:
    return bool(piece.text or piece.finish_reason or piece.logprobs or piece.tool_calls)


@dataclass(frozen=True)
class Completion:
    id: str = field(compare=False)
    request_id: str | None = field(compare=False)
    created: int = field(compare=False)
    model: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True)
class Tokens:
    tokens: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True)
class Embeddings:
    model: str
    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Model:
    id: str
    family: str
    engine: str
    quantization: str
    context: int
    ready: bool


@dataclass(frozen=True)
class Event:
    """What one message of a stream says. Messages without `pieces` may still have the usage."""

    id: str
    model: str
    pieces: tuple[Piece, ...]
    usage: Usage | None
    request_id: str | None


@dataclass(frozen=True)
class ClientCall:
    """One request as its protocol has it: where it goes, what is sent, and how its answer, or each message of a stream,
    is read together with the request id that came back."""

    target: str
    payload: Any
    read: Callable[[Any, str | None], Any]
    request_id: str | None = None


class Wire(Protocol):
    """How requests are written in one protocol. `options` are the HTTP API's fields. Raises InvalidRequestError for
    what cannot be written."""

    def complete(self, model: str, prompt: Prompt, options: dict[str, Any], stream: bool) -> ClientCall: ...
    def chat(self, model: str, messages: Messages, options: dict[str, Any], stream: bool) -> ClientCall: ...
    def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool) -> ClientCall: ...
    def detokenize(self, model: str, tokens: Sequence[int]) -> ClientCall: ...
    def embed(self, model: str, input: Prompt) -> ClientCall: ...
    def models(self) -> ClientCall: ...


class Transport(Protocol):
    """Raises NibbleError: the server's own error, or that there is none at the other end."""

    wire: Wire

    def ask(self, call: ClientCall) -> Any: ...
    def stream(self, call: ClientCall) -> Iterator[Event]: ...
    def ready(self) -> bool: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    wire: Wire

    async def ask(self, call: ClientCall) -> Any: ...
    def stream(self, call: ClientCall) -> AsyncIterator[Event]: ...
    async def ready(self) -> bool: ...
    async def close(self) -> None: ...


def token_text(data: bytes) -> str:
    """As the HTTP API writes a completion's tokens."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + codecs.escape_encode(data)[0].decode()


def made_error(
    kind: type[NibbleError], message: str, field: str | None = None, retry_after: str | None = None
) -> NibbleError:
    """The error that the server raised, made again from what it told."""
    if issubclass(kind, InvalidRequestError):
        return kind(message, field)
    if issubclass(kind, RetryLaterError):
        return kind(message, int(retry_after) if retry_after and retry_after.isdecimal() else 1)
    return kind(message)


def no_server(url: str, why: object) -> NibbleError:
    return NibbleError(f"{url}: {why}; is `nibble serve` running there?")
