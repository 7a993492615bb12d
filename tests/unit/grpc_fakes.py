"""gRPC without a server: the servicers on a router of echoes, what they use of Serve's context, the request log."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.grpc.grpc_api import GrpcApi
from deployments.api.grpc.grpc_calls import StreamFailedError
from deployments.api.kserve.kserve_api import KserveApi
from deployments.api.operations import Operations
from deployments.routing.router import Router
from protos import inference_pb2 as pb
from tests.unit.fakes import EchoModel

CHAT = pb.Chat(
    messages=[pb.ChatMessage(role="system", content="Be brief."), pb.ChatMessage(role="user", content="a b")]
)


class Api(GrpcApi, KserveApi):
    """As the ingress has them."""


class Context:
    """Of Serve's gRPC context; what a client gets back is read from it."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, Any] = {}
        self.binary: dict[str, bytes] = {}  # of the trailing metadata too

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, Any]]) -> None:
        self.trailing = {name: value for name, value in metadata if not name.endswith("-bin")}
        self.binary = {name: value for name, value in metadata if name.endswith("-bin")}


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "ray.serve.requests"]


def api_of(model: EchoModel, auth: AuthConfig | None = None, prompts: bool = False, **limits: Any) -> Api:
    api = Api()
    router = Router({"echo": model, "absent": EchoModel("absent", ready=False)}, LimitsConfig(**limits))
    api.operations = Operations(router, Calls(Access(auth or AuthConfig()), LoggingConfig(prompts=prompts)))
    return api


def ask(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": "echo", **fields})


async def stream(api: Api, request: pb.GenerateRequest, context: Context | None = None) -> list[Any]:
    return await drained(api.GenerateStream(request, context := context or Context()), context)


async def drained(messages: AsyncIterator[Any], context: Context) -> list[Any]:
    """The messages of a stream, and it must fail where it has an error's code, and only there."""
    found = []
    try:
        async for message in messages:
            found.append(message)
    except StreamFailedError:
        assert context.code is not None
    else:
        assert context.code is None
    return found
