"""The gRPC side of the router: nibble.v1.Inference and grpc.health.v1.Health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from grpc_health.v1 import health_pb2

from cluster.errors import ModelNotFoundError, NibbleError
from deployments.api.grpc.grpc_calls import GrpcCall, StreamFailedError, tell, telling
from deployments.api.grpc.grpc_records import (
    detokenize_record,
    embedding_record,
    generation_record,
    token_logprobs,
    tokenize_record,
    tool_calls,
)
from deployments.api.grpc.grpc_services import INFERENCE_SERVICE, SERVICES, wellformed
from deployments.api.operations import Operations
from deployments.records import GenerationChunk
from deployments.routing.router import ModelCard
from deployments.routing.sequences import WholeSequence
from protos import inference_pb2 as pb

HEALTH_POLL_S = 1.0

Health = health_pb2.HealthCheckResponse


class GrpcApi:
    """Mixed into the ingress deployment: Serve finds a method by the RPC's name, and `grpc_context` by its name too."""

    operations: Operations

    async def Generate(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Generate", grpc_context) as call:
            call.admit(request, self.operations.limits)
            record = generation_record(request, stream=False)
            created = int(time.time())
            whole = await self.operations.generate(call.record, record, call.request_id)
            wanted = request.HasField("logprobs")  # best_of has them without being asked for
            return pb.GenerateResponse(
                id=call.request_id,
                model=record.model,
                created=created,
                choices=[choice(index, completion, wanted) for index, completion in enumerate(whole)],
                usage=usage(call),
            )
        return pb.GenerateResponse()

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        with self._call("GenerateStream", grpc_context, errors="raised") as call:
            call.admit(request, self.operations.limits)
            record = generation_record(request, stream=True)
            created = int(time.time())
            async with aclosing(self.operations.begin(call.record, record, call.request_id)) as generation:
                async for index, chunk in generation:
                    message = pb.GenerateStreamResponse(
                        id=call.request_id, model=record.model, created=created, choice=choice(index, chunk, True)
                    )
                    if generation.complete:
                        message.usage.CopyFrom(usage(call))
                    yield message

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Tokenize", grpc_context) as call:
            call.admit(request, self.operations.limits)
            ids, context = await self.operations.tokenize(call.record, tokenize_record(request))
            return pb.TokenizeResponse(tokens=ids, max_model_len=context)
        return pb.TokenizeResponse()

    async def Detokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Detokenize", grpc_context) as call:
            call.admit(request, self.operations.limits)
            text = await self.operations.detokenize(call.record, detokenize_record(request))
            return pb.DetokenizeResponse(prompt=text)
        return pb.DetokenizeResponse()

    async def Embed(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Embed", grpc_context) as call:
            call.admit(request, self.operations.limits)
            record = embedding_record(request)
            vectors, tokens = await self.operations.embed(call.record, record)
            answer = pb.EmbedResponse(model=record.model, prompt_tokens=tokens)
            for vector in vectors:
                answer.embeddings.add(values=vector)
            return answer
        return pb.EmbedResponse()

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("ListModels", grpc_context) as call:
            call.admit(request, self.operations.limits)
            return pb.ListModelsResponse(models=map(model_message, self.operations.models()))
        return pb.ListModelsResponse()

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Of a model by its name; of the whole, every model ready, by the empty name or that of a service."""
        with telling(grpc_context):
            return Health(status=self._health(wellformed(request).service))
        return Health()

    async def List(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Of everything that `Check` knows."""
        with telling(grpc_context):
            wellformed(request)
            names = ("", *SERVICES, *(card.id for card in self.operations.models()))
            statuses = {name: Health(status=self._health(name)) for name in names}
            return health_pb2.HealthListResponse(statuses=statuses)
        return health_pb2.HealthListResponse()

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        """The status now and at every change, until the server shuts down."""
        try:
            service = wellformed(request).service
        except NibbleError as error:
            tell(grpc_context, error)
            raise StreamFailedError from None
        last = None
        while True:
            try:
                status = self._health(service)
            except ModelNotFoundError:
                status = Health.SERVICE_UNKNOWN  # the protocol wants the watch to go on
            if status != last:
                yield Health(status=status)
                last = status
            if self.operations.router.draining:  # a watch that went on would hold up the drain
                return
            await asyncio.sleep(HEALTH_POLL_S)

    def _call(self, method: str, grpc_context: Any, errors: Literal["returned", "raised"] = "returned") -> GrpcCall:
        return GrpcCall(self.operations.calls, f"/{INFERENCE_SERVICE}/{method}", grpc_context, errors)

    def _health(self, service: str) -> Any:
        ready = {card.id: card.ready for card in self.operations.models()}
        if service in ("", *SERVICES):
            return Health.SERVING if all(ready.values()) else Health.NOT_SERVING
        if service not in ready:
            raise ModelNotFoundError(f"service: found {service!r}, known are {', '.join((*SERVICES, *ready))}")
        return Health.SERVING if ready[service] else Health.NOT_SERVING


def choice(index: int, piece: WholeSequence | GenerationChunk, with_logprobs: bool) -> pb.Choice:
    """Of a piece of a completion `finish_reason` is unset but in the last one."""
    return pb.Choice(
        index=index,
        text=piece.text if piece.message is None else piece.message.content,
        tool_calls=tool_calls(piece),
        finish_reason=piece.finish_reason,
        token_ids=piece.token_ids,
        logprobs=token_logprobs(piece.logprobs) if with_logprobs else (),
    )


def model_message(card: ModelCard) -> pb.Model:
    fields = card._asdict()
    del fields["root"]
    return pb.Model(**fields)


def usage(call: GrpcCall) -> pb.Usage:
    prompt_tokens, completion_tokens = call.record.prompt_tokens, call.record.completion_tokens
    total = prompt_tokens + completion_tokens
    return pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
