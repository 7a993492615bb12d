"""Streams to HTTP/1.0 clients, who know no chunks (RFC 9112, section 6.1): such an answer ends with its connection.

uvicorn 0.54 sends chunks to them all the same in its httptools protocol, which Serve runs; its h11 protocol does not.
"""

from __future__ import annotations

import sys
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

UNKNOWN = sys.maxsize  # the length of an answer that has not ended


def end_with_the_connection() -> None:
    """What has no Content-Length, for HTTP/1.0 clients, in this process from now on."""
    if RequestResponseCycle.send is not _send:
        setattr(RequestResponseCycle, "send", _send)  # noqa: B010 - to mypy a method is no variable


_uvicorns_send = RequestResponseCycle.send


async def _send(cycle: RequestResponseCycle, message: Any) -> None:
    if cycle.scope["http_version"] == "1.0":
        if not cycle.response_started:
            if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                cycle.keep_alive, cycle.chunked_encoding = False, False
                cycle.expected_content_length = UNKNOWN
        elif not message.get("more_body", False) and cycle.expected_content_length > UNKNOWN // 2:
            # uvicorn holds what was sent against the length that it was told.
            cycle.expected_content_length = len(message.get("body", b""))
    await _uvicorns_send(cycle, message)
