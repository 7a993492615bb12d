"""The client's HTTP side: requests as JSON, streams as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from cluster.errors import DeadlineError, InvalidRequestError, NibbleError
from deployments.client.messages import (
    REQUEST_ID,
    Choice,
    ClientCall,
    Completion,
    Embeddings,
    Event,
    Messages,
    Model,
    Piece,
    Prompt,
    TokenLogprob,
    Tokens,
    Usage,
    Wire,
    made_error,
    no_server,
    says_something,
    token_text,
)
from deployments.error_statuses import STATUSES
from deployments.records import ToolCallPiece

DONE = "[DONE]"
# What the server answers while a model waits for a replica.
NOT_READY = 503


class HttpWire:
    def complete(self, model: str, prompt: Prompt, options: dict[str, Any], stream: bool) -> ClientCall:
        body = {"model": model, "prompt": prompt, **options}
        return generating("/v1/completions", body, stream)

    def chat(self, model: str, messages: Messages, options: dict[str, Any], stream: bool) -> ClientCall:
        return generating("/v1/chat/completions", {"model": model, "messages": messages, **options}, stream)

    def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool) -> ClientCall:
        name = "prompt" if isinstance(prompt, str) else "messages"
        body = {"model": model, name: prompt, "add_special_tokens": add_special_tokens}
        return ClientCall("/v1/tokenize", body, lambda found, _: Tokens(tuple(found["tokens"]), found["max_model_len"]))

    def detokenize(self, model: str, tokens: Sequence[int]) -> ClientCall:
        return ClientCall("/v1/detokenize", {"model": model, "tokens": list(tokens)}, lambda found, _: found["prompt"])

    def embed(self, model: str, input: Prompt) -> ClientCall:
        def read(found: Any, _: str | None) -> Embeddings:
            vectors = tuple(tuple(each["embedding"]) for each in found["data"])
            return Embeddings(found["model"], vectors, found["usage"]["prompt_tokens"])

        return ClientCall("/v1/embeddings", {"model": model, "input": input}, read)

    def models(self) -> ClientCall:
        names = ("id", "family", "engine", "quantization", "context", "ready")
        return ClientCall(
            "/v1/models", None, lambda found, _: [Model(*(card[name] for name in names)) for card in found["data"]]
        )


def generating(path: str, body: dict[str, Any], stream: bool) -> ClientCall:
    if stream:
        return ClientCall(path, body | {"stream": True, "stream_options": {"include_usage": True}}, read_event)
    return ClientCall(path, body, read_completion)


def usage_of(found: Any) -> Usage:
    """Servers tell more of it than these."""
    return Usage(found["prompt_tokens"], found["completion_tokens"], found["total_tokens"])


def read_completion(found: Any, request_id: str | None) -> Completion:
    choices = tuple(Choice(*choice_fields(choice, choice.get("message"))) for choice in found["choices"])
    return Completion(found["id"], request_id, found["created"], found["model"], choices, usage_of(found["usage"]))


def read_event(found: Any, request_id: str | None) -> Event:
    pieces = (Piece(*choice_fields(choice, choice.get("delta"))) for choice in found["choices"])
    usage = usage_of(found["usage"]) if found.get("usage") else None
    # A chat begins with the assistant's role alone.
    told = tuple(piece for piece in pieces if says_something(piece))
    return Event(found["id"], found["model"], told, usage, request_id)


def choice_fields(choice: Any, message: Any) -> tuple[Any, ...]:
    """`message`: a chat's; of a piece, what is new in it."""
    text = choice["text"] if message is None else message.get("content") or ""
    calls = tool_calls((message or {}).get("tool_calls") or ())
    return choice["index"], text, choice["finish_reason"], logprobs(choice.get("logprobs")), calls


def tool_calls(found: Sequence[Any]) -> tuple[ToolCallPiece, ...]:
    """Those of a whole message have no index."""
    return tuple(
        ToolCallPiece(
            call.get("index", index), call["function"]["arguments"], call.get("id"), call["function"].get("name")
        )
        for index, call in enumerate(found)
    )


def logprobs(found: Any) -> tuple[TokenLogprob, ...] | None:
    if found is None:
        return None
    if "content" in found:
        return tuple(
            TokenLogprob(
                chat_token(each),
                each["logprob"],
                tops((chat_token(t), t["logprob"]) for t in each["top_logprobs"]),
                None,
            )
            for each in found["content"]
        )
    columns = (found[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    return tuple(
        TokenLogprob(token, logprob, tuple((top or {}).items()), offset)
        for token, logprob, top, offset in zip(*columns, strict=True)
    )


def chat_token(found: Any) -> str:
    return token_text(bytes(found["bytes"]))


def tops(pairs: Iterator[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """One for each text: tokens of the same text are told apart by neither protocol's readers."""
    return tuple(dict(pairs).items())


class EventDecoder:
    """Server-sent events from the bytes as they come. Lines end at \\n and \\r\\n only: what else
    httpx takes for a line's end may be a part of the text."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[str]:
        """The data of each event that is complete; comments are dropped."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data).decode()
                self._data.clear()


class StreamReader:
    """A call's stream from its bytes."""

    def __init__(self, call: ClientCall, response: httpx.Response) -> None:
        self._decoder = EventDecoder()
        self._call = call
        self._request_id = response.headers.get(REQUEST_ID, call.request_id)
        self.done = False

    def feed(self, received: bytes) -> Iterator[Event]:
        """Raises NibbleError for an error among the events."""
        for data in self._decoder.feed(received):
            if data == DONE:
                self.done = True
                return
            found = json.loads(data)
            if "error" in found:
                raise error_of(None, found, None)
            yield self._call.read(found, self._request_id)

    def end(self) -> None:
        if not self.done:
            raise NibbleError("the stream broke off before its end")


def error_of(status: int | None, body: Any, retry_after: str | None) -> NibbleError:
    """The server's error by the table that it has its status from; in a stream, whose status is 200, by OpenAI's type
    and code alone."""
    error = body["error"]
    for kind, known in STATUSES.items():
        if status in (None, known.http) and (error["type"], error["code"]) == (known.type, known.code):
            return made_error(kind, error["message"], error["param"], retry_after)
    return NibbleError(str(error["message"]))


def response_error(response: httpx.Response) -> NibbleError:
    """Of a response that was read. Something else than nibble may have answered."""
    try:
        return error_of(response.status_code, response.json(), response.headers.get("retry-after"))
    except (ValueError, KeyError, TypeError):
        return NibbleError(f"{response.url}: HTTP {response.status_code}: {response.text[:200]}")


class HttpConnection:
    """What the blocking and the asynchronous transport share."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        self.wire: Wire = HttpWire()
        self.url = url
        self.timeout = timeout
        self.settings: dict[str, Any] = {
            "base_url": url,
            "timeout": timeout,
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        }

    def request(self, client: Any, call: ClientCall) -> httpx.Request:
        headers = {} if call.request_id is None else {REQUEST_ID: call.request_id}
        if call.payload is None:
            return client.build_request("GET", call.target, headers=headers)  # type: ignore[no-any-return]
        try:
            content = json.dumps(call.payload, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"body: no JSON can be made of it: {error}") from None
        headers["Content-Type"] = "application/json"
        return client.build_request("POST", call.target, content=content, headers=headers)  # type: ignore[no-any-return]

    def answer(self, call: ClientCall, response: httpx.Response) -> Any:
        if response.status_code != 200:
            raise response_error(response)
        try:
            return call.read(response.json(), response.headers.get(REQUEST_ID, call.request_id))
        except (ValueError, KeyError, TypeError) as error:
            raise NibbleError(f"{response.url}: not an answer of nibble's: {error!r}") from None

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise no_server(self.url, str(error) or "no connection in time") from None
        except httpx.TimeoutException:
            raise DeadlineError(f"{self.url}: no answer within {self.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise no_server(self.url, str(error) or type(error).__name__) from None


class HttpTransport(HttpConnection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(url, api_key, timeout)
        self._client = httpx.Client(**self.settings)

    def ask(self, call: ClientCall) -> Any:
        with self.errors():
            return self.answer(call, self._client.send(self.request(self._client, call)))

    def stream(self, call: ClientCall) -> Iterator[Event]:
        with self.errors():
            response = self._client.send(self.request(self._client, call), stream=True)
            try:
                if response.status_code != 200:
                    response.read()
                    raise response_error(response)
                reader = StreamReader(call, response)
                for received in response.iter_bytes():
                    yield from reader.feed(received)
                reader.end()
            finally:
                response.close()

    def ready(self) -> bool:
        with self.errors():
            response = self._client.get("/readyz")
        if response.status_code not in (200, NOT_READY):
            raise response_error(response)
        return response.status_code == 200

    def close(self) -> None:
        self._client.close()


class AsyncHttpTransport(HttpConnection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(url, api_key, timeout)
        self._client = httpx.AsyncClient(**self.settings)

    async def ask(self, call: ClientCall) -> Any:
        with self.errors():
            return self.answer(call, await self._client.send(self.request(self._client, call)))

    async def stream(self, call: ClientCall) -> AsyncIterator[Event]:
        with self.errors():
            response = await self._client.send(self.request(self._client, call), stream=True)
            try:
                if response.status_code != 200:
                    await response.aread()
                    raise response_error(response)
                reader = StreamReader(call, response)
                async for received in response.aiter_bytes():
                    for event in reader.feed(received):
                        yield event
                reader.end()
            finally:
                await response.aclose()

    async def ready(self) -> bool:
        with self.errors():
            response = await self._client.get("/readyz")
        if response.status_code not in (200, NOT_READY):
            raise response_error(response)
        return response.status_code == 200

    async def close(self) -> None:
        await self._client.aclose()
