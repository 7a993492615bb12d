"""What no client library sends, to a running cluster: through HAProxy, Serve and the router."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos import inference_pb2 as pb
from protos import open_inference_pb2
from tests.integration.api.http2 import call
from tests.integration.processes import Served

TIMEOUT_S = 60
NOT_PROTOBUF = b"\xff\xff\xff"
NOT_UTF8 = b"\x0a\x02\xff\xfe"  # field 1, a string of two bytes
SERVICES = [
    (pb, "Inference"),
    (open_inference_pb2, "GRPCInferenceService"),
    (health_pb2, "Health"),
]
METHODS = [method for file, name in SERVICES for method in file.DESCRIPTOR.services_by_name[name].methods]


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield channel


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_a_message_that_cannot_be_parsed_is_an_invalid_argument(channel: grpc.Channel, method: Any) -> None:
    messages = [NOT_PROTOBUF]
    if method.input_type.fields and method.input_type.fields[0].type == 9:  # a string
        messages.append(NOT_UTF8)
    for message in messages:
        assert refused(channel, method, message).startswith(f"message: not a {method.input_type.full_name}: ")


def refused(channel: grpc.Channel, method: Any, message: bytes) -> str:
    """What the client is told."""
    shape = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    function = getattr(channel, shape)(f"/{method.containing_service.full_name}/{method.name}")
    if method.name == "ModelStreamInfer":  # its errors are messages, and the stream goes on
        (answer,) = function(iter([message]), timeout=TIMEOUT_S)
        return open_inference_pb2.ModelStreamInferResponse.FromString(answer).error_message
    with pytest.raises(grpc.RpcError) as error:
        next(function(message, timeout=TIMEOUT_S)) if method.server_streaming else function(message, timeout=TIMEOUT_S)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(error.value.details())


def test_the_health_of_everything(channel: grpc.Channel) -> None:
    answer = channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=TIMEOUT_S)
    statuses = health_pb2.HealthListResponse.FromString(answer).statuses
    assert {"", "nibble.v1.Inference", "llama", "narrow"} <= statuses.keys()
    assert {each.status for each in statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}


def test_a_method_that_is_not_there_is_unimplemented(channel: grpc.Channel) -> None:
    for path in ("/nibble.v1.Inference/Nothing", "/grpc.health.v1.Health/Nothing", "/nobody.v1.Nothing/Nothing"):
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(path)(b"", timeout=TIMEOUT_S)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED, path


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_has_both_of_its_names(channel: grpc.Channel, version: str) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    listed = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    answers = channel.stream_stream(path)(iter([NOT_PROTOBUF, listed]), timeout=TIMEOUT_S)
    malformed, services = map(reflection_pb2.ServerReflectionResponse.FromString, answers)
    assert malformed.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "nibble.v1.Inference" in {each.name for each in services.list_services_response.service}


def answer_to(served: Served, *headers: tuple[str, bytes]) -> tuple[int, list[str], Any]:
    """Status, X-Request-Ids, and the body, which must be JSON."""
    connection = http.client.HTTPConnection(served.http.removeprefix("http://"), timeout=TIMEOUT_S)
    try:
        connection.putrequest("GET", "/v1/models")
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        ids = answer.headers.get_all("X-Request-Id") or []
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, ids, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("sent", [b"job-7", b"a b", b"x" * 200, b"\xc3\xbc"])
def test_an_answer_has_one_request_id(served: Served, sent: bytes) -> None:
    status, ids, _ = answer_to(served, ("X-Request-Id", sent))
    assert (status, len(ids)) == (200, 1)
    assert (ids[0] == sent.decode("latin-1")) == (sent == b"job-7")


@pytest.mark.parametrize("name", ["X-Request-Id", "X-Session-Id", "X-Request-Timeout-Seconds", "traceparent"])
def test_a_header_that_is_not_utf_8_is_refused_by_its_name(served: Served, name: str) -> None:
    status, ids, body = answer_to(served, (name, b"a\xff"))
    assert (status, len(ids)) == (400, 1)
    assert body["error"]["message"].startswith(f"header {name.lower()}: ")


def test_headers_that_nobody_decodes_may_have_any_bytes(served: Served) -> None:
    status, ids, _ = answer_to(served, ("Authorization", b"Bearer \xff"), ("User-Agent", b"\xff"))
    assert (status, len(ids)) == (200, 1)


METADATA = [b"a b", b"\xff", "ü".encode(), b"x" * 3000]


@pytest.mark.parametrize("value", METADATA, ids=["a space", "no UTF-8", "no ASCII", "long"])
@pytest.mark.parametrize("name", ["x-request-id", "request_id", "authorization", "traceparent", "multiplexed_model_id"])
def test_metadata_that_no_client_library_sends(served: Served, name: str, value: bytes) -> None:
    """It is answered, and the server goes on. Serve sends its own `request_id` back as it came: gRPC does not send it
    where it is not ASCII, and the call fails."""
    request = pb.TokenizeRequest(model="llama", prompt="a").SerializeToString()
    status, trailers = call(served.grpc, "/nibble.v1.Inference/Tokenize", request, [(name.encode(), value)])
    lost = name == "request_id" and not value.isascii()
    expected = [b"13", b"Invalid metadata"] if lost else [b"0", b""]
    assert (status, [trailers.get(key) for key in (b"grpc-status", b"grpc-message")]) == (200, expected)
    assert (b"x-request-id" in trailers) != lost


@pytest.mark.parametrize("stream", [True, False])
def test_an_http_1_0_client_reads_a_stream_until_its_connection_ends(served: Served, stream: bool) -> None:
    """It knows no chunks (RFC 9112, section 6.1)."""
    body = json.dumps({"model": "llama", "prompt": "Q:", "max_tokens": 3, "stream": stream}).encode()
    host, _, port = served.http.removeprefix("http://").partition(":")
    head = "POST /v1/completions HTTP/1.0\r\nHost: nibble\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert b" 200 OK" in headers.split(b"\r\n")[0]
    assert b"transfer-encoding" not in headers.lower()
    if stream:
        events = content.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(event.startswith(b"data: ") for event in events[:-1])
    else:
        assert json.loads(content)["object"] == "text_completion"
