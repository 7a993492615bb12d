"""An OpenAI-compatible server of a few lines, over real HTTP on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = tuple[int, Sequence[str]]


def event(text: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': 'c', 'choices': [choice], 'usage': None})}\n\n"


def usage_event(prompt_tokens: int, completion_tokens: int) -> str:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return f"data: {json.dumps({'id': 'c', 'choices': [], 'usage': usage})}\n\n"


def completion(body: Body) -> Answer:
    """As many chunks as tokens were asked for, and the usage where it was asked for."""
    count = body["max_tokens"]
    events = [event(f"w{n} ", "length" if n == count - 1 else None) for n in range(count)]
    if "stream_options" in body:
        events.append(usage_event(len(body["prompt"]), count))
    return 200, [*events, "data: [DONE]\n\n"]


def refusal(status: int, message: str) -> Answer:
    return status, [json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})]


class SseServer:
    """`answer` makes a request's status and what is sent, a piece at a time; `pause_s` lies before each. A request for
    which it raises ConnectionError loses its connection after the pieces that the error holds."""

    def __init__(self, answer: Callable[[Body], Answer] = completion, pause_s: float = 0.001) -> None:
        self.answer = answer
        self.pause_s = pause_s
        self.bodies: list[Body] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SseServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def handler_of(server: SseServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 0

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.bodies.append(body)
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))
            server.connections.add(self.client_address)
            try:
                status, pieces = server.answer(body)
            except ConnectionError as error:
                status, pieces = 200, error.args
                self.close_connection = True
            self.send_response(status)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for piece in pieces:
                threading.Event().wait(server.pause_s)
                data = piece.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            if not self.close_connection:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    return Handler
