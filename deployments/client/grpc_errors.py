"""The errors that a gRPC call ended with, as the server raised them."""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status.rpc_status import from_call

from cluster.errors import NibbleError, RateLimitError, RequestTooLargeError
from deployments.client.messages import REQUEST_ID, made_error, no_server
from deployments.error_statuses import DOMAIN, STATUSES

REASONS = {status.reason: kind for kind, status in STATUSES.items()}
# Serve sends no trailing metadata, and so no details, of a stream that fails. Where two errors share a code, nibble's
# messages tell them apart.
SIGNS: tuple[tuple[type[NibbleError], str], ...] = (
    (RateLimitError, r"API key "),
    (RequestTooLargeError, r"message: .*\(limits\.body_bytes\)"),
)
# How gRPC's own library words that no server answers, or none any more.
UNREACHED = re.compile(r"failed to connect|DNS|name resolution|socket closed|connection|GOAWAY|recvmsg", re.IGNORECASE)


def error_of(url: str, error: Any) -> NibbleError:
    """The server's error: by the details that it sent, or else by its code and message alone."""
    code, message = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and REQUEST_ID not in metadata and UNREACHED.search(message):
        return no_server(url, message)
    rich = details_of(error)
    info = detail(rich, error_details_pb2.ErrorInfo)
    if info is not None and info.domain == DOMAIN and info.reason in REASONS:
        violations = getattr(detail(rich, error_details_pb2.BadRequest), "field_violations", ())
        retry = detail(rich, error_details_pb2.RetryInfo)
        seconds = str(retry.retry_delay.seconds) if retry is not None else None
        return made_error(REASONS[info.reason], message, violations[0].field if violations else None, seconds)
    kinds = [kind for kind, status in STATUSES.items() if status.grpc is code]
    if not kinds:
        return NibbleError(f"{url}: gRPC {code.name}: {message}")
    kind = next((kind for kind, sign in SIGNS if kind in kinds and re.match(sign, message)), kinds[0])
    # Messages begin with the field that they are about.
    named = re.match(r"([a-z_]\w*(?:\[\d+\]|\.\w+)*): ", message)
    return made_error(kind, message, named[1] if named else None, metadata.get("retry-after"))


def details_of(error: Any) -> status_pb2.Status:
    """Empty where the server sent none, or none that belong to its code and message."""
    try:
        return from_call(error) or status_pb2.Status()
    except (ValueError, DecodeError):
        return status_pb2.Status()


def detail(status: status_pb2.Status, kind: Any) -> Any:
    """The first detail of this message type, None where there is none."""
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None
