"""A gRPC call as plain HTTP/2, whose metadata may have any bytes."""

from __future__ import annotations

import socket
import struct

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

Headers = list[tuple[bytes, bytes]]
TIMEOUT_S = 60


def call(address: str, path: str, message: bytes, metadata: Headers) -> tuple[int, dict[bytes, bytes]]:
    """The HTTP status, and the trailers (the headers where there is nothing else). A stream that is reset has status 0
    and the code as `reset`."""
    host, _, port = address.rpartition(":")
    config = H2Configuration(header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False)
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        http2 = H2Connection(config)
        http2.initiate_connection()
        head = [
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", address.encode()),
            (b"content-type", b"application/grpc"), (b"te", b"trailers"),
        ]  # fmt: skip
        http2.send_headers(1, [*head, *metadata])
        http2.send_data(1, struct.pack(">BI", 0, len(message)) + message, end_stream=True)
        connection.sendall(http2.data_to_send())
        status, found = 0, dict[bytes, bytes]()
        while data := connection.recv(1 << 16):
            for event in http2.receive_data(data):
                if isinstance(event, ResponseReceived):
                    found = dict(event.headers)
                    status = int(found[b":status"])
                elif isinstance(event, TrailersReceived):
                    found = dict(event.headers)
                elif isinstance(event, DataReceived):
                    http2.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, StreamReset | ConnectionTerminated):
                    return 0, {b"reset": str(event.error_code).encode()}
                elif isinstance(event, StreamEnded):
                    return status, found
            connection.sendall(http2.data_to_send())
        return status, found
