"""The gRPC services as Serve adds them to its servers, in place of the generated functions.

Those make gRPC parse each message, and what it cannot parse ends the call as UNKNOWN, with the names of Python classes.
Here such a message reaches the method as a `MalformedMessage`, so that it is refused as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE
from grpc_reflection.v1alpha.reflection import aio as reflection

from cluster.errors import InvalidRequestError
from protos import inference_pb2, inference_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc

Message = TypeVar("Message")
Handlers = Mapping[str, grpc.RpcMethodHandler]

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
OPEN_INFERENCE_SERVICE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVICES = (INFERENCE_SERVICE, OPEN_INFERENCE_SERVICE)
# The same messages under a later name, which clients try first; grpcio-reflection does not have it.
REFLECTION_V1_SERVICE = "grpc.reflection.v1.ServerReflection"


class MalformedMessage:
    """In the place of a message that is no protobuf, or has a string that is not UTF-8."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name


def wellformed(message: Any) -> Any:
    """The message itself. Raises InvalidRequestError."""
    if isinstance(message, MalformedMessage):
        raise InvalidRequestError(
            f"message: not a {message.type_name}: it is no valid protobuf, or one of its strings is not UTF-8"
        )
    return message


def add_inference(servicer: Any, server: Any) -> None:
    add(INFERENCE_SERVICE, inference_pb2_grpc.add_InferenceServicer_to_server, servicer, server)


def add_open_inference(servicer: Any, server: Any) -> None:
    add(OPEN_INFERENCE_SERVICE, open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    add(HEALTH_SERVICE, health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


def add_reflection(_: Any, server: Any) -> None:
    """In the place of Serve's own, which has the first name only. The server answers it itself, with Serve's way of
    not handing a service to replicas; an empty message is refused in its answer."""
    services = reflection.ReflectionServicer([*SERVICES, HEALTH_SERVICE, REFLECTION_SERVICE])
    (handlers,) = generated(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, services).values()
    empty = reflection_pb2.ServerReflectionRequest
    for service in (REFLECTION_SERVICE, REFLECTION_V1_SERVICE):
        server.add_passthrough_service(service)
        register(service, parsed_or(handlers, lambda _: empty()), server)


# Their names in Serve's configuration.
SERVICER_FUNCTIONS = tuple(
    f"{__name__}.{function.__name__}" for function in (add_inference, add_open_inference, add_health, add_reflection)
)


def add(service: str, add_generated: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    handlers = generated(add_generated, servicer)[service]
    register(service, parsed_or(handlers, MalformedMessage), server)


class Registry:
    """Takes, as a server, what a generated function adds."""

    def __init__(self) -> None:
        self.services: dict[str, Handlers] = {}

    def add_generic_rpc_handlers(self, _: Any) -> None:
        """The same handlers in another form."""

    def add_registered_method_handlers(self, service: str, handlers: Handlers) -> None:
        self.services[service] = handlers


def generated(add_generated: Callable[[Any, Any], None], servicer: Any) -> dict[str, Handlers]:
    """The handlers, by method, of each service."""
    registry = Registry()
    add_generated(servicer, registry)
    return registry.services


def register(service: str, handlers: Handlers, server: Any) -> None:
    """As generated code does."""
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_registered_method_handlers(service, handlers)


def parsed_or(handlers: Handlers, instead: Callable[[str], Any]) -> Handlers:
    """Handlers that get `instead(name of the message's type)` for a message that cannot be parsed."""
    return {
        method: handler._replace(request_deserializer=deserializer(handler.request_deserializer, instead))
        for method, handler in handlers.items()
    }


def deserializer(parse: Callable[[bytes], Message], instead: Callable[[str], Any]) -> Callable[[bytes], Message | Any]:
    type_name = type(parse(b"")).DESCRIPTOR.full_name  # type: ignore[attr-defined]

    def deserialize(data: bytes) -> Message | Any:
        try:
            return parse(data)
        except DecodeError:
            return instead(type_name)

    return deserialize
