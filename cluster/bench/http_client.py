"""Completions over HTTP, from any OpenAI-compatible server: POST /v1/completions, streamed."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from cluster.bench.http1 import Answer, BenchConnection, ClosedUnusedError
from cluster.bench.load_records import Failure, Fields, Now, Prompt, Reply

CONNECT_TIMEOUT_S = 10
DONE = b"[DONE]"
MAX_MESSAGE = 300  # of a server's error, in characters
DEFAULT_PORTS = {"http": 80, "https": 443}


class HttpClient:
    """`url`: the server's, with a path where its API is not below /v1. Each request outstanding has a connection; they
    are kept from one request to the next."""

    def __init__(self, url: str, model: str, output_tokens: int, api_key: str | None, now: Now) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._now = now
        self._body = {"model": model, "max_tokens": output_tokens, "temperature": 0, "stream": True}
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {parts.path.rstrip('/') or '/v1'}/completions HTTP/1.1\r\n"
            f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
            f"Content-Type: application/json\r\nAccept: text/event-stream\r\n{key}Content-Length: "
        )
        self._idle: list[BenchConnection] = []

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        body = json.dumps(self._body | {"prompt": prompt} | dict(fields)).encode()
        try:
            connection, answer = await self._ask(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            return Reply((), self._now(), failure=Failure("connection", str(error) or "no connection in time"))
        end = self._now()
        if answer.keeps_connection:
            self._idle.append(connection)
        return reply_of(answer, end)

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _ask(self, request: bytes) -> tuple[BenchConnection, Answer]:
        while True:
            connection = await self._connection()
            try:
                return connection, await connection.exchange(request)
            except ClosedUnusedError:
                # Some servers (llama-server) close after a stream without having said so. A new connection, which comes
                # when all kept ones are used up, does not raise this.
                continue

    async def _connection(self) -> BenchConnection:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        making = asyncio.get_running_loop().create_connection(
            lambda: BenchConnection(self._now), self._host, self._port, ssl=self._tls
        )
        _, made = await asyncio.wait_for(making, CONNECT_TIMEOUT_S)
        return made


def reply_of(answer: Answer, end: float) -> Reply:
    if answer.status != 200:
        return Reply((), end, failure=Failure(f"HTTP {answer.status}", error_message(answer.content)))
    try:
        return reply_of_events(events(answer.pieces), end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Reply((), end, failure=Failure("stream", f"not a completion's: {error!r}"))


def reply_of_events(found: Iterable[tuple[float, bytes]], end: float) -> Reply:
    """Raises ValueError, KeyError, TypeError or AttributeError for events that are no completion's."""
    chunks: list[float] = []
    reasons: list[float] = []
    usage: dict[str, Any] = {}
    done = False
    for time, data in found:
        if data == DONE:
            done = True
            break
        event = json.loads(data)
        if event.get("error"):
            return Reply(tuple(chunks), end, failure=Failure("stream", error_message(data)))
        usage = event.get("usage") or usage
        # The last one of some servers has no token of its own, only the reason for the end.
        choices = event.get("choices", ())
        if any(choice.get("text") or not choice.get("finish_reason") for choice in choices):
            chunks.append(time)
        elif choices:
            reasons.append(time)
    chunks = chunks or reasons  # the only token was one that ends
    failure = None
    if not done:
        failure = Failure("stream", "broke off before [DONE]")
    elif not chunks:
        failure = Failure("stream", "held no token")
    return Reply(tuple(chunks), end, usage.get("prompt_tokens"), usage.get("completion_tokens"), failure)


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event with the time when its line was complete; comments are dropped. A completion's events have
    one line each."""
    rest = b""
    for time, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield time, line.removeprefix(b"data:").strip()


def error_message(body: bytes) -> str:
    """Of OpenAI's error object, of what others send instead, or the text itself; on one line."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    message = found if isinstance(found, str) else json.dumps(found)
    return " ".join(message.split())[:MAX_MESSAGE]
