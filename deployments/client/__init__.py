"""The Python client, blocking and asynchronous, over HTTP or gRPC:

    with NibbleClient("http://127.0.0.1:8000") as client:  # or grpc://127.0.0.1:9000, https://, grpcs://
        print(client.complete("llama", "Q: What is CPU? A:", max_tokens=64, temperature=0).text)
        for piece in client.stream("llama", "Q: What is CPU? A:", max_tokens=64):
            print(piece.text, end="")

Options are the HTTP API's fields (a chat's `tools` and `tool_choice` too), by the same names over gRPC; `request_id` is
sent along and comes back. Answers are the same over both protocols, and so are errors: those of `cluster/errors.py`,
each a NibbleError. Nothing is retried. It needs no Ray and no engine.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ConfigError, InvalidRequestError
from deployments.client.messages import (
    AsyncTransport,
    ClientCall,
    Completion,
    Embeddings,
    Event,
    Messages,
    Model,
    Piece,
    Prompt,
    Tokens,
    Transport,
    Usage,
    Wire,
)

API_KEY_VARIABLE = "NIBBLE_API_KEY"
TIMEOUT_S = 600.0
SCHEMES = ("http", "https", "grpc", "grpcs")
OWN_OPTIONS = ("stream", "stream_options")  # the client's choice


class NibbleClient:
    """Blocking. `api_key`: by default that of the environment's NIBBLE_API_KEY. `timeout`: seconds, over gRPC for the
    whole of a request, over HTTP for each wait for its next bytes."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = TIMEOUT_S) -> None:
        url, api_key = server_url(url), api_key or os.environ.get(API_KEY_VARIABLE)
        self._transport: Transport
        # The other protocol's library is not loaded.
        if url.startswith("http"):
            from deployments.client.http_transport import HttpTransport

            self._transport = HttpTransport(url, api_key, timeout)
        else:
            from deployments.client.grpc_transport import GrpcTransport

            self._transport = GrpcTransport(url, api_key, timeout)

    def complete(self, model: str, prompt: Prompt, **options: Any) -> Completion:
        """`prompt`: a text, its token ids, or a list of those."""
        completion: Completion = self._transport.ask(completing(self._transport.wire, model, prompt, options, False))
        return completion

    def stream(self, model: str, prompt: Prompt, **options: Any) -> PieceStream:
        return PieceStream(self._transport.stream(completing(self._transport.wire, model, prompt, options, True)))

    def chat(self, model: str, messages: Messages, **options: Any) -> Completion:
        """`messages`: {"role": …, "content": …} each; the choices' texts are the assistant's answers. With tools,
        `Choice.tool_calls` are what it calls, and `Choice.message` is what goes back into `messages`."""
        completion: Completion = self._transport.ask(chatting(self._transport.wire, model, messages, options, False))
        return completion

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> PieceStream:
        return PieceStream(self._transport.stream(chatting(self._transport.wire, model, messages, options, True)))

    def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool = True) -> Tokens:
        """Of a text, or of a conversation as the model's chat template writes it."""
        tokens: Tokens = self._transport.ask(self._transport.wire.tokenize(model, prompt, add_special_tokens))
        return tokens

    def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return str(self._transport.ask(self._transport.wire.detokenize(model, tokens)))

    def embed(self, model: str, input: Prompt) -> Embeddings:
        """A vector for each input."""
        embeddings: Embeddings = self._transport.ask(self._transport.wire.embed(model, input))
        return embeddings

    def models(self) -> list[Model]:
        models: list[Model] = self._transport.ask(self._transport.wire.models())
        return models

    def ready(self) -> bool:
        """Whether every model has a running replica."""
        return self._transport.ready()

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> NibbleClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncNibbleClient:
    """The same for asyncio."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = TIMEOUT_S) -> None:
        url, api_key = server_url(url), api_key or os.environ.get(API_KEY_VARIABLE)
        self._transport: AsyncTransport
        if url.startswith("http"):
            from deployments.client.http_transport import AsyncHttpTransport

            self._transport = AsyncHttpTransport(url, api_key, timeout)
        else:
            from deployments.client.grpc_transport import AsyncGrpcTransport

            self._transport = AsyncGrpcTransport(url, api_key, timeout)

    async def complete(self, model: str, prompt: Prompt, **options: Any) -> Completion:
        call = completing(self._transport.wire, model, prompt, options, False)
        completion: Completion = await self._transport.ask(call)
        return completion

    def stream(self, model: str, prompt: Prompt, **options: Any) -> AsyncPieceStream:
        return AsyncPieceStream(self._transport.stream(completing(self._transport.wire, model, prompt, options, True)))

    async def chat(self, model: str, messages: Messages, **options: Any) -> Completion:
        call = chatting(self._transport.wire, model, messages, options, False)
        completion: Completion = await self._transport.ask(call)
        return completion

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> AsyncPieceStream:
        return AsyncPieceStream(self._transport.stream(chatting(self._transport.wire, model, messages, options, True)))

    async def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool = True) -> Tokens:
        tokens: Tokens = await self._transport.ask(self._transport.wire.tokenize(model, prompt, add_special_tokens))
        return tokens

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return str(await self._transport.ask(self._transport.wire.detokenize(model, tokens)))

    async def embed(self, model: str, input: Prompt) -> Embeddings:
        embeddings: Embeddings = await self._transport.ask(self._transport.wire.embed(model, input))
        return embeddings

    async def models(self) -> list[Model]:
        models: list[Model] = await self._transport.ask(self._transport.wire.models())
        return models

    async def ready(self) -> bool:
        return await self._transport.ready()

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> AsyncNibbleClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


class StreamState:
    """What a stream has told of itself so far; the usage comes at its end."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.request_id: str | None = None
        self.model: str | None = None
        self.usage: Usage | None = None

    def _took(self, event: Event) -> tuple[Piece, ...]:
        self.id, self.request_id, self.model = event.id, event.request_id, event.model
        self.usage = event.usage or self.usage
        return event.pieces


class PieceStream(StreamState):
    """The pieces of a stream as they come. The request is sent when the first one is asked for. `close`, which the end
    of a `with` block calls too, ends the generation on the server."""

    def __init__(self, events: Iterator[Event]) -> None:
        super().__init__()
        self._events: Any = events
        self._pieces = (piece for event in events for piece in self._took(event))

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()
        self._events.close()

    def __enter__(self) -> PieceStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncPieceStream(StreamState):
    """The same for asyncio."""

    def __init__(self, events: AsyncIterator[Event]) -> None:
        super().__init__()
        self._events: Any = events
        self._pieces = (piece async for event in events for piece in self._took(event))

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def close(self) -> None:
        await self._pieces.aclose()
        await self._events.aclose()

    async def __aenter__(self) -> AsyncPieceStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def completing(wire: Wire, model: str, prompt: Prompt, options: dict[str, Any], stream: bool) -> ClientCall:
    request_id = taken_request_id(options)
    return replace(wire.complete(model, prompt, options, stream), request_id=request_id)


def chatting(wire: Wire, model: str, messages: Messages, options: dict[str, Any], stream: bool) -> ClientCall:
    request_id = taken_request_id(options)
    return replace(wire.chat(model, messages, options, stream), request_id=request_id)


def taken_request_id(options: dict[str, Any]) -> str | None:
    """Out of the options, which then are the request's fields alone."""
    for name in OWN_OPTIONS:
        if name in options:
            raise InvalidRequestError(f"{name}: the client sets it itself; use stream() or stream_chat()", name)
    request_id: str | None = options.pop("request_id", None)
    return request_id


def checked_url(url: str) -> str:
    """Raises ConfigError for anything but SCHEME://HOST:PORT."""
    try:
        parts = urlsplit(url)
        complete = parts.scheme in SCHEMES and parts.hostname and not parts.query and not parts.fragment
        complete = complete and (
            parts.scheme.startswith("http") or (parts.port is not None and parts.path in ("", "/"))
        )
    except ValueError:
        complete = False
    if not complete:
        raise ConfigError(
            f"url: found {url!r}, allowed are http://HOST:PORT and grpc://HOST:PORT (https:// and grpcs:// with TLS)"
        )
    return url.rstrip("/")


def server_url(url: str) -> str:
    """Without the `/v1` with which OpenAI's clients have it. Raises ConfigError as `checked_url`."""
    url = checked_url(url)
    return url.removesuffix("/v1") if url.startswith("http") else url
