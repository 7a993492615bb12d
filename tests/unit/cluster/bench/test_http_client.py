"""Answers from their bytes; the HTTP client on a server of this process."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from cluster.bench.http1 import Answer
from cluster.bench.http_client import HttpClient, error_message, events, reply_of_events
from cluster.bench.load_records import Failure, Fields, Reply
from cluster.ray_cluster import free_ports
from tests.unit.sse_server import SseServer, completion, event, refusal, usage_event

USAGE: Fields = {"stream_options": {"include_usage": True}}
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"4\r\ndata\r\n"
    b"a;name=value\r\n0\r\n\r\n: 1\r\n\r\n"
    b"0\r\nTrailer: x\r\n\r\n"
)


def answer_of(data: bytes, step: int) -> Answer:
    answer = Answer()
    for start in range(0, len(data), step):
        answer.feed(float(start), data[start : start + step])
    return answer


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_chunked_answer_is_read_however_its_bytes_come(step: int) -> None:
    answer = answer_of(CHUNKED, step)
    assert answer.done
    assert answer.keeps_connection
    assert answer.content == b"data0\r\n\r\n: 1\r\n"[:14]
    assert not answer_of(CHUNKED[:-1], step).done


def test_a_piece_has_the_time_at_which_it_was_whole() -> None:
    answer = Answer()
    answer.feed(1.0, CHUNKED[: CHUNKED.index(b"ta\r\n")])
    assert answer.pieces == []
    answer.feed(2.0, b"ta\r\n")
    answer.feed(3.0, b"1\r\nx\r\n1\r\ny\r\n")
    assert answer.pieces == [(2.0, b"data"), (3.0, b"xy")]


@pytest.mark.parametrize("step", [1, 1000])
def test_an_answer_of_known_length(step: int) -> None:
    answer = answer_of(b"HTTP/1.1 429 Too Many\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc", step)
    assert (answer.status, answer.content, answer.done, answer.keeps_connection) == (429, b"abc", True, False)
    assert answer_of(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", step).done


def test_an_answer_that_ends_with_its_connection() -> None:
    answer = answer_of(b"HTTP/1.0 200 OK\r\n\r\nabc", 4)
    assert not answer.done
    assert answer.closed()
    assert answer.content == b"abc"
    assert not answer_of(CHUNKED[:-1], 9).closed()
    assert not answer_of(b"HTTP/1.1 200", 9).closed()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
        b"x" * 100_000,
    ],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        answer_of(data, 10)


def test_an_event_has_the_time_at_which_its_line_was_whole() -> None:
    pieces = [(1.0, b": comment\n\nda"), (2.0, b"ta: a\r"), (3.0, b"\n\r\ndata:b\n\ndata: c\n"), (4.0, b"\ndata: lost")]
    assert list(events(pieces)) == [(3.0, b"a"), (3.0, b"b"), (3.0, b"c")]


def reply_to(*texts: str) -> Reply:
    pieces = [(float(n), text.encode()) for n, text in enumerate(texts)]
    return reply_of_events(events(pieces), 9.0)


def test_chunks_are_the_events_that_stand_for_tokens() -> None:
    # The second: a part of a character, or a special token. The last one of some servers: a reason alone.
    texts = event("a"), event(""), event("", "length"), usage_event(4, 3), "data: [DONE]\n\n"
    assert reply_to(*texts) == Reply((0.0, 1.0), 9.0, 4, 3)
    assert reply_to(event("a", "stop"), "data: [DONE]\n\n") == Reply((0.0,), 9.0)
    assert reply_to(event("", "stop"), usage_event(4, 1), "data: [DONE]\n\n") == Reply((0.0,), 9.0, 4, 1)
    two = 'data: {"choices": [{"text": "a"}, {"text": "b"}]}\n\n'
    assert reply_to(two, "data: [DONE]\n\n") == Reply((0.0,), 9.0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((event("a"),), "broke off before [DONE]"),
        (("data: [DONE]\n\n",), "held no token"),
        ((event("a"), 'data: {"error": {"message": "lost"}}\n\n', "data: [DONE]\n\n"), "lost"),
    ],
)
def test_a_stream_that_failed(texts: tuple[str, ...], message: str) -> None:
    assert reply_to(*texts).failure == Failure("stream", message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no", "type": "x"}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": [{"loc": 1}]}', '[{"loc": 1}]'),
        (b'{"message": "no"}', "no"),
        (b"<html>\n no\n</html>", "<html> no </html>"),
        (b"x" * 1000, "x" * 300),
        (b"\xff", "\ufffd"),
        (b"", ""),
    ],
)
def test_an_error_s_message_is_one_line(body: bytes, message: str) -> None:
    assert error_message(body) == message


def client_for(url: str, key: str | None = None) -> HttpClient:
    return HttpClient(url, "m", 3, key, time.perf_counter)


async def test_a_completion_is_asked_for_and_timed() -> None:
    with SseServer() as server:
        client = client_for(server.url, "secret")
        before = time.perf_counter()
        reply = await client.complete((5, 6), {"ignore_eos": True, **USAGE})
        await client.close()
    assert server.paths == ["/v1/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.bodies == [
        {"model": "m", "max_tokens": 3, "temperature": 0, "stream": True, "prompt": [5, 6], "ignore_eos": True, **USAGE}
    ]
    assert reply.failure is None
    assert (reply.prompt_tokens, reply.completion_tokens, len(reply.chunks)) == (2, 3, 3)
    # Chunks that are read at once have the same time.
    assert before < reply.chunks[0] <= reply.chunks[1] <= reply.chunks[2] <= reply.end


@pytest.mark.parametrize(("path", "expected"), [("/", "/v1"), ("/v1", "/v1"), ("/v3/", "/v3")])
async def test_the_api_s_path_is_the_url_s(path: str, expected: str) -> None:
    with SseServer() as server:
        client = client_for(server.url + path)
        reply = await client.complete("text", {})
        await client.close()
    assert server.paths == [f"{expected}/completions"]
    assert server.bodies[0]["prompt"] == "text"
    assert "Authorization" not in server.headers[0]
    assert (reply.completion_tokens, len(reply.chunks)) == (None, 3)


async def test_connections_are_kept_and_there_is_one_for_each_request_outstanding() -> None:
    with SseServer() as server:
        client = client_for(server.url)
        for _ in range(3):
            await asyncio.gather(*(client.complete("text", {}) for _ in range(4)))
        await client.close()
    assert len(server.bodies) == 12
    assert len(server.connections) == 4


async def test_errors_are_the_reply_s_and_do_not_end_the_client() -> None:
    with SseServer(lambda body: refusal(429, "queue full")) as server:
        client = client_for(server.url)
        reply = await client.complete("text", {})
        assert reply.failure == Failure("HTTP 429", "queue full")
        assert reply.chunks == ()
        server.answer = completion
        assert (await client.complete("text", {})).failure is None
        await client.close()
    assert len(server.connections) == 1


async def test_a_connection_that_ends_early_is_a_failure_and_the_next_request_has_a_new_one() -> None:
    def lost(body: dict[str, object]) -> tuple[int, list[str]]:
        raise ConnectionError(event("a"))

    with SseServer(lost) as server:
        client = client_for(server.url)
        failure = (await client.complete("text", {})).failure
        assert failure == Failure("connection", "closed before the end of the answer: no reason")
        server.answer = completion
        assert (await client.complete("text", {})).failure is None
        await client.close()
    assert len(server.connections) == 2


async def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used() -> None:
    with SseServer() as server:
        client = client_for(server.url)
        await client.complete("text", {})
        for connection in client._idle:
            connection.close()
        assert (await client.complete("text", {})).failure is None
        await client.close()
    assert len(server.connections) == 2


async def test_a_kept_connection_that_the_server_closes_without_a_word_is_made_anew() -> None:
    """As llama-server does after each stream: the end of the connection may come after the next request went out."""
    asked, handlers = 0, []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        handlers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        data = f"{event('a')}data: [DONE]\n\n".encode()
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        with contextlib.suppress(asyncio.IncompleteReadError):  # after the last one the client is the one to close
            await reader.readuntil(b"\r\n\r\n")  # the next request, which is not answered
        writer.close()

    server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = client_for(f"http://127.0.0.1:{port}")
    for _ in range(3):
        assert (await client.complete("text", {})).failure is None
    await client.close()
    await asyncio.gather(*handlers)
    server.close()
    await server.wait_closed()
    assert asked == 3


async def test_nobody_there_is_a_failure() -> None:
    (port,) = free_ports(1)
    failure = (await client_for(f"http://127.0.0.1:{port}").complete("text", {})).failure
    assert failure is not None
    assert failure.kind == "connection"
    assert "Connect call failed" in failure.message


async def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    with SseServer(pause_s=0.2) as server:
        client = client_for(server.url)
        task = asyncio.ensure_future(client.complete("text", {}))
        while not server.bodies:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client._idle == []
        server.pause_s = 0.0
        assert (await client.complete("text", {})).failure is None
        await client.close()
    assert len(server.connections) == 2
