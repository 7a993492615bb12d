"""The gRPC client on a servicer of a few lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from cluster.bench.grpc_client import METHOD, GrpcClient, reply_of
from cluster.bench.load_records import Failure, Reply
from cluster.ray_cluster import free_ports
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server


class Servicer(InferenceServicer):
    """As many tokens as were asked for, one a message; no more than two where `full`."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.full = False

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        for n in range(request.max_tokens):
            if self.full and n == 2:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue\nfull")
            last = n == request.max_tokens - 1
            choice = pb.Choice(text="w ", finish_reason="length" if last else None)
            usage = pb.Usage(prompt_tokens=len(request.prompt_tokens.ids), completion_tokens=request.max_tokens)
            yield pb.GenerateStreamResponse(choice=choice, usage=usage if last else None)


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def url(servicer: Servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    server.stop(None).wait()


async def test_a_completion_is_asked_for_and_timed(servicer: Servicer, url: str) -> None:
    client = GrpcClient(url, "m", 3, "secret", time.perf_counter)
    before = time.perf_counter()
    reply = await client.complete((5, 6), {"ignore_eos": True})
    await client.close()
    (request,) = servicer.requests
    assert (request.model, request.max_tokens, request.temperature, request.ignore_eos) == ("m", 3, 0.0, True)
    assert list(request.prompt_tokens.ids) == [5, 6]
    assert servicer.metadata[0]["authorization"] == "Bearer secret"
    assert reply.failure is None
    assert (reply.prompt_tokens, reply.completion_tokens, len(reply.chunks)) == (2, 3, 3)
    assert before < reply.chunks[0] <= reply.chunks[1] <= reply.chunks[2] <= reply.end


async def test_a_text_is_sent_as_one(servicer: Servicer, url: str) -> None:
    client = GrpcClient(url, "m", 3, None, time.perf_counter)
    assert (await client.complete("a text", {})).failure is None
    await client.close()
    assert servicer.requests[0].prompt == "a text"
    assert "authorization" not in servicer.metadata[0]


async def test_errors_are_the_reply_s_also_in_the_middle_of_a_stream(servicer: Servicer, url: str) -> None:
    client = GrpcClient(url, "m", 3, None, time.perf_counter)
    servicer.full = True
    assert (await client.complete("a", {})).failure == Failure("gRPC RESOURCE_EXHAUSTED", "queue full")
    servicer.full = False
    assert (await client.complete("a", {})).failure is None
    await client.close()


async def test_nobody_there_is_a_failure() -> None:
    (port,) = free_ports(1)
    client = GrpcClient(f"grpc://127.0.0.1:{port}", "m", 3, None, time.perf_counter)
    failure = (await client.complete("a", {})).failure
    await client.close()
    assert failure is not None
    assert failure.kind == "gRPC UNAVAILABLE"


def test_messages_that_stand_for_tokens_are_the_chunks() -> None:
    texts = [("a", None), ("", None), ("", "length")]
    messages = [pb.GenerateStreamResponse(choice=pb.Choice(text=t, finish_reason=reason)) for t, reason in texts]
    received = [(float(n), message.SerializeToString()) for n, message in enumerate(messages)]
    assert reply_of(received, 9.0) == Reply((0.0, 1.0), 9.0)
    assert reply_of(received[2:], 9.0) == Reply((2.0,), 9.0)
    assert reply_of([], 9.0).failure == Failure("stream", "held no token")


def test_the_method_is_that_of_the_wire_contract() -> None:
    assert METHOD == "/nibble.v1.Inference/GenerateStream"
