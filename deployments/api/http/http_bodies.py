"""A request's body: no longer than allowed, unpacked where the client packed it, and as JSON."""

from __future__ import annotations

import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive

from cluster.errors import InvalidRequestError, RequestTooLargeError
from deployments.api.requests.parsing import strict_json

GZIP = ("gzip", "x-gzip")
GZIP_FORMAT = 16 + zlib.MAX_WBITS  # zlib's way to say: with gzip's header and checksum


async def json_body(request: Request) -> Any:
    """Raises InvalidRequestError for a body that is no JSON (NaN and Infinity are none)."""
    return parsed_json(await request.body())


def parsed_json(content: bytes) -> Any:
    """Raises InvalidRequestError."""
    try:
        return strict_json(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"body: not valid JSON: {error}") from None


def plain(receive: Receive, headers: Headers, limit: int) -> Receive:
    """The body as the client meant it. When it is read, it raises RequestTooLargeError as soon as it is known to be
    longer than `limit` bytes, packed or not, and InvalidRequestError for one that cannot be unpacked."""
    receive = bounded(receive, headers.get("content-length"), limit)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return receive
    return unpacked(receive, limit) if encoding in GZIP else refused(encoding)


def bounded(receive: Receive, content_length: str | None, limit: int) -> Receive:
    announced = content_length is not None and content_length.isdecimal() and int(content_length) > limit
    received = 0

    async def read() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if announced or received > limit:
            raise too_large(limit)
        return message

    return read


def unpacked(receive: Receive, limit: int) -> Receive:
    """Never more than `limit` bytes are unpacked, however many a small body would make."""
    unpacker, length = zlib.decompressobj(GZIP_FORMAT), 0

    async def read() -> Any:
        nonlocal length
        message = await receive()
        if message["type"] != "http.request":
            return message
        packed, body = message.get("body", b""), b""
        try:
            if packed and not unpacker.eof:
                body = unpacker.decompress(packed, limit - length + 1)
                packed = unpacker.unused_data
        except zlib.error as error:
            raise InvalidRequestError(f"body: not valid gzip: {error}") from None
        length += len(body)
        if length > limit:
            raise too_large(limit)
        if packed and unpacker.eof:
            raise InvalidRequestError("body: not valid gzip: it goes on behind its end")
        if not message.get("more_body", False) and not unpacker.eof:
            raise InvalidRequestError("body: not valid gzip: it ends too early")
        return {**message, "body": body}

    return read


def refused(encoding: str) -> Receive:
    async def read() -> Any:
        raise InvalidRequestError(
            f"Content-Encoding: found {encoding[:80]!r}, allowed are gzip and identity", "Content-Encoding"
        )

    return read


def too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"body: more than {limit} bytes, allowed are up to {limit} (limits.body_bytes)")
