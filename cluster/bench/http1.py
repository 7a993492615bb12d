"""HTTP/1.1 answers as bytes with the times of their arrival.

A load generator shares the machine with what it measures. This takes a third of the CPU that httpx needs for each
piece of a stream, because nothing is resumed, decoded or parsed between the socket and the note of the time.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from cluster.bench.load_records import Now

MAX_HEAD = 1 << 16
CRLF = b"\r\n"


class ResponseBody(Protocol):
    """`done`: all of it was fed. `open_ended`: it ends where the connection does."""

    done: bool
    open_ended: bool

    def feed(self, data: bytes) -> bytes:
        """What of the content these bytes complete. Raises ValueError for what is no such body."""


class ChunkedBody:
    open_ended = False

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> bytes:
        buffer, start, contents = self._rest + data, 0, []
        while not self.done and (line_end := buffer.find(CRLF, start)) >= 0:
            size = int(buffer[start:line_end].partition(b";")[0], 16)
            if size < 0:
                raise ValueError("a chunk of negative size")
            if size == 0:
                # Trailers, of which there are hardly ever any, end with an empty line.
                self.done = buffer.find(CRLF + CRLF, line_end) >= 0
                break
            end = line_end + 2 + size + 2
            if len(buffer) < end:
                break
            contents.append(buffer[line_end + 2 : end - 2])
            start = end
        self._rest = buffer[start:]
        return b"".join(contents)


class SizedBody:
    open_ended = False

    def __init__(self, size: int) -> None:
        self._left = size
        self.done = size == 0

    def feed(self, data: bytes) -> bytes:
        content = data[: self._left]
        self._left -= len(content)
        self.done = self._left == 0
        return content


class OpenBody:
    done = False
    open_ended = True

    def feed(self, data: bytes) -> bytes:
        return data


class Answer:
    """One answer from the bytes as they come. `pieces`: of its body, each with the time when it arrived."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self._head = b""
        self._body: ResponseBody | None = None

    @property
    def done(self) -> bool:
        return self._body is not None and self._body.done

    @property
    def keeps_connection(self) -> bool:
        return self.done and self.headers.get("connection", "").lower() != "close"

    @property
    def content(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    def feed(self, time: float, data: bytes) -> None:
        """Raises ValueError for what is no HTTP answer."""
        while self._body is None:
            head, end, rest = (self._head + data).partition(CRLF + CRLF)
            if not end:
                self._head = head
                if len(head) > MAX_HEAD:
                    raise ValueError(f"a head of more than {MAX_HEAD} bytes")
                return
            self._head, data = b"", rest
            self._read_head(head.decode("latin-1"))
        if content := self._body.feed(data):
            self.pieces.append((time, content))

    def closed(self) -> bool:
        """Whether the answer is whole now that the connection has ended."""
        return self._body is not None and (self._body.done or self._body.open_ended)

    def _read_head(self, head: str) -> None:
        status, *lines = head.split("\r\n")
        version, _, rest = status.partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not HTTP/1.1: {status[:60]!r}")
        self.status = int(rest[:3])
        if self.status < 200:
            return  # another head follows
        fields = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._body = ChunkedBody()
        elif "content-length" in self.headers:
            self._body = SizedBody(int(self.headers["content-length"]))
        else:
            self._body = OpenBody()


class ClosedUnusedError(ConnectionError):
    """The server had closed a connection that was kept open, before it saw the request: safe to ask again."""


class BenchConnection(asyncio.Protocol):
    """To a server, for one request after another."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._answer = Answer()
        self._finished: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None
        self._answered = 0  # requests

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes) -> Answer:
        """Raises ConnectionError where the connection ends before the answer does (ClosedUnusedError where it ends
        after an earlier one, with not a byte of this), ValueError for what is no answer. If cancelled it closes the
        connection: by that the server hears that nobody waits any more."""
        assert self._transport is not None, "used only once it is connected"
        self._answer = Answer()
        self._finished = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            return await self._finished
        finally:
            if not self._answer.keeps_connection:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        time = self._now()
        if self._finished is None or self._finished.done():
            self.close()  # nothing was asked
            return
        try:
            self._answer.feed(time, data)
        except ValueError as error:
            self._finished.set_exception(ValueError(f"not an HTTP answer: {error}"))
        else:
            if self._answer.done:
                self._answered += 1
                self._finished.set_result(self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        if self._finished is None or self._finished.done():
            return
        if self._answer.closed():
            self._finished.set_result(self._answer)
        elif self._answered and not self._answer.status:
            self._finished.set_exception(ClosedUnusedError("closed before the request"))
        else:
            self._finished.set_exception(
                ConnectionError(f"closed before the end of the answer: {error or 'no reason'}")
            )
