"""The client's side of server-sent events."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.errors import NibbleError
from deployments.client import NibbleClient
from deployments.client.http_transport import EventDecoder


def test_a_stream_whose_events_break_off_fails() -> None:
    event = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "a\u2028b", "finish_reason": None}]}
    left = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            data = json.dumps(event, ensure_ascii=False).encode()
            self.wfile.write(b": keep-alive\n\ndata: " + data + b"\n\n: keep-alive\n\n")
            self.wfile.flush()
            if self.path == "/v1/chat/completions":
                return
            try:
                while True:  # until the client has closed the connection
                    self.wfile.write(b": keep-alive\n\n")
            except OSError:
                left.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with NibbleClient(f"http://127.0.0.1:{server.server_port}") as client:
            broken = client.stream_chat("m", [])
            event["choices"] = [{"index": 0, "delta": {"content": "a\u2028b"}, "finish_reason": None}]
            assert next(broken).text == "a\u2028b"
            with pytest.raises(NibbleError, match="broke off before its end"):
                next(broken)
            event["choices"] = [{"index": 0, "text": "a\u2028b", "finish_reason": None}]
            with client.stream("m", "a") as stream:
                assert next(stream).text == "a\u2028b"
                assert not left.is_set()
            assert left.wait(30)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_told_from_bytes_in_pieces_of_any_size(size: int) -> None:
    received = ': keep-alive\n\ndata: {"a": "\u2028é\x85"}\r\n\r\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n'.encode()
    decoder = EventDecoder()
    pieces = [received[start : start + size] for start in range(0, len(received), size)]
    found = [data for piece in pieces for data in decoder.feed(piece)]
    assert found == ['{"a": "\u2028é\x85"}', "1\n2", "[DONE]"]
