"""The services on one of Serve's own gRPC servers, whose methods answer with what they were given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve._private.proxy_request_response import gRPCStreamingType
from ray.serve.config import gRPCOptions

from cluster.errors import InvalidRequestError
from cluster.ray_cluster import free_ports
from deployments.api.grpc.grpc_services import MalformedMessage, wellformed
from deployments.app import grpc_options
from protos import inference_pb2 as pb
from protos import open_inference_pb2

NOT_PROTOBUF = b"\xff\xff\xff"
NOT_UTF8 = b"\x0a\x02\xff\xfe"  # field 1, a string of two bytes


def answering(service_method: str, streaming_type: gRPCStreamingType) -> Any:
    async def unary(request: Any, context: Any) -> bytes:
        return told(request)

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        if hasattr(request, "__aiter__"):
            async for message in request:
                yield told(message)
        else:
            yield told(request)

    return unary if streaming_type == gRPCStreamingType.UNARY_UNARY else stream


def told(request: Any) -> bytes:
    return repr(request.type_name if isinstance(request, MalformedMessage) else type(request).__name__).encode()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    (port,) = free_ports(1)
    _, server = await start_grpc_server(
        answering, gRPCOptions(**grpc_options(port)), event_loop=asyncio.get_running_loop()
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield channel
    await server.stop(None)


METHODS = [
    method
    for file, service in (
        (pb, "Inference"),
        (open_inference_pb2, "GRPCInferenceService"),
        (health_pb2, "Health"),
    )
    for method in file.DESCRIPTOR.services_by_name[service].methods
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_a_message_that_is_none_reaches_each_method(channel: grpc.aio.Channel, method: Any) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    assert await first(channel, method, path, b"") == repr(method.input_type.name)
    assert await first(channel, method, path, NOT_PROTOBUF) == repr(method.input_type.full_name)
    if method.input_type.fields and method.input_type.fields[0].type == 9:  # a string
        assert await first(channel, method, path, NOT_UTF8) == repr(method.input_type.full_name)


async def first(channel: grpc.aio.Channel, method: Any, path: str, data: bytes) -> str:
    """The answer, or a stream's first one."""
    if method.client_streaming:
        (answer,) = [each async for each in channel.stream_stream(path)(iter([data]))]
    elif method.server_streaming:
        (answer,) = [each async for each in channel.unary_stream(path)(data)]
    else:
        answer = await channel.unary_unary(path)(data)
    return bytes(answer).decode()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_under_both_of_its_names(channel: grpc.aio.Channel, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    listed = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="nibble.v1.Inference").SerializeToString()
    services, malformed, file = [each async for each in call(iter([listed, NOT_PROTOBUF, symbol]))]
    assert {each.name for each in services.list_services_response.service} == {
        "nibble.v1.Inference",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert malformed.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert file.file_descriptor_response.file_descriptor_proto


def test_what_is_refused_is_named() -> None:
    request = pb.GenerateRequest()
    assert wellformed(request) is request
    with pytest.raises(InvalidRequestError, match=r"^message: not a nibble\.v1\.GenerateRequest: "):
        wellformed(MalformedMessage("nibble.v1.GenerateRequest"))
