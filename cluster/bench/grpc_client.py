"""Completions of nibble over gRPC: nibble.v1.Inference/GenerateStream."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from cluster.bench.load_records import Failure, Fields, Now, Prompt, Reply
from protos import inference_pb2 as pb

METHOD = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}/GenerateStream"


class GrpcClient:
    """`url`: grpc://HOST:PORT, or grpcs:// with TLS. All requests share one channel. Messages are parsed once a stream
    has ended: until then their bytes and times are kept."""

    def __init__(self, url: str, model: str, output_tokens: int, api_key: str | None, now: Now) -> None:
        scheme, _, target = url.partition("://")
        if scheme == "grpcs":
            self._channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials())
        else:
            self._channel = grpc.aio.insecure_channel(target)
        self._generate = self._channel.unary_stream(METHOD, request_serializer=pb.GenerateRequest.SerializeToString)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._base: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "temperature": 0.0}
        self._now = now

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        request = pb.GenerateRequest(**self._base, **fields)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_tokens.ids.extend(prompt)
        received: list[tuple[float, bytes]] = []
        call = self._generate(request, metadata=self._metadata)
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                received.append((self._now(), message))
        except grpc.aio.AioRpcError as error:
            failure = Failure(f"gRPC {error.code().name}", " ".join((error.details() or "").split()))
            return Reply((), self._now(), failure=failure)
        finally:
            call.cancel()
        return reply_of(received, self._now())

    async def close(self) -> None:
        await self._channel.close()


def reply_of(received: list[tuple[float, bytes]], end: float) -> Reply:
    chunks: list[float] = []
    reasons: list[float] = []
    usage: Any = None
    for time, data in received:
        message = pb.GenerateStreamResponse.FromString(data)
        usage = message.usage if message.HasField("usage") else usage
        if message.choice.text or not message.choice.finish_reason:
            chunks.append(time)
        else:
            reasons.append(time)
    chunks = chunks or reasons  # the only token was one that ends
    if not chunks:
        return Reply((), end, failure=Failure("stream", "held no token"))
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (None, None)
    return Reply(tuple(chunks), end, *counts)
