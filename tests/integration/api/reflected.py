"""A gRPC client that knows a service by its server's reflection alone, as grpcurl does: without stubs of ours."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

TIMEOUT_S = 60


class ReflectedService:
    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self._channel = channel
        self.descriptor = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(name)

    def call(self, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers, one where the method does not stream, in protobuf's JSON form but for their fields' names."""
        descriptor = self.descriptor.methods_by_name[method]
        message = ParseDict(request, GetMessageClass(descriptor.input_type)())
        shape = f"{('unary', 'stream')[descriptor.client_streaming]}_{('unary', 'stream')[descriptor.server_streaming]}"
        function = getattr(self._channel, shape)(
            f"/{self.descriptor.full_name}/{method}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        answer = function(iter([message]) if descriptor.client_streaming else message, timeout=TIMEOUT_S)
        answers = list(answer) if descriptor.server_streaming else [answer]
        return [MessageToDict(each, preserving_proto_field_name=True) for each in answers]
