"""The gRPC side of the router: nibble.v1.Inference and grpc.health.v1.Health. Serve adds reflection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from grpc_health.v1 import health_pb2

from cluster.errors import InvalidRequestError, ModelNotFoundError
from deployments.api.calls import Calls
from deployments.api.grpc_calls import GrpcCall, tell
from deployments.api.grpc_records import (
    detokenize_record,
    embedding_record,
    generation_record,
    token_logprobs,
    tokenize_record,
)
from deployments.api.schema import ChatRequest, CompletionRequest
from deployments.records import GenerationChunk
from deployments.routing.router import Completion, Router, best, collect
from protos import inference_pb2 as pb
from protos import open_inference_pb2 as open_inference_pb

SERVICER_FUNCTIONS = (
    "protos.inference_pb2_grpc.add_InferenceServicer_to_server",
    "protos.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
INFERENCE_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
OPEN_INFERENCE_SERVICE = open_inference_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVICES = (INFERENCE_SERVICE, OPEN_INFERENCE_SERVICE)
HEALTH_POLL_S = 1.0

Health = health_pb2.HealthCheckResponse


class GrpcApi:
    """Mixed into the ingress deployment: Serve finds a method by the RPC's name, and `grpc_context` by its name too."""

    router: Router
    calls: Calls

    async def Generate(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Generate", grpc_context) as call:
            record = self._generation(call, request, stream=False)
            created, requests = int(time.time()), record.completions(call.request_id, self.router.limits)
            chunks = call.record.counted(self.router.generate(record.model, requests), record.sequences)
            every = await collect(chunks, len(requests))
            wanted = request.HasField("logprobs")  # best_of has them without being asked for
            return pb.GenerateResponse(
                id=call.request_id,
                model=record.model,
                created=created,
                choices=[choice(i, c, wanted) for i, c in enumerate(best(every, record.n, record.sequences))],
                usage=usage(call),
            )
        return pb.GenerateResponse()

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        with self._call("GenerateStream", grpc_context, errors="raised") as call:
            record = self._generation(call, request, stream=True)
            created, requests = int(time.time()), record.completions(call.request_id, self.router.limits)
            unfinished = len(requests)
            async with aclosing(
                call.record.counted(self.router.generate(record.model, requests), record.sequences)
            ) as chunks:
                async for index, chunk in chunks:
                    message = pb.GenerateStreamResponse(
                        id=call.request_id, model=record.model, created=created, choice=choice(index, chunk, True)
                    )
                    unfinished -= chunk.finish_reason is not None
                    if not unfinished:
                        message.usage.CopyFrom(usage(call))
                    yield message

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Tokenize", grpc_context) as call:
            call.admit(request, self.router.limits)
            record = tokenize_record(request)
            call.record.about(record.model)
            model = self.router.model(record.model)
            ids = await model.tokenize(record.text(), record.add_special_tokens)
            return pb.TokenizeResponse(tokens=ids, max_model_len=model.config.context)
        return pb.TokenizeResponse()

    async def Detokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Detokenize", grpc_context) as call:
            call.admit(request, self.router.limits)
            record = detokenize_record(request)
            call.record.about(record.model)
            return pb.DetokenizeResponse(prompt=await self.router.model(record.model).detokenize(record.tokens))
        return pb.DetokenizeResponse()

    async def Embed(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("Embed", grpc_context) as call:
            limits = self.router.limits
            call.admit(request, limits)
            record = embedding_record(request)
            call.record.about(record.model, record.input)
            inputs = record.inputs()
            if len(inputs) > limits.choices:
                raise InvalidRequestError(f"input: found {len(inputs)}, allowed are up to {limits.choices}", "input")
            model = self.router.model(record.model)
            answer = pb.EmbedResponse(model=record.model)
            for each in inputs:
                vector, tokens = await model.embed(each, limits.prompt_tokens)
                answer.embeddings.add(values=vector)
                answer.prompt_tokens += tokens
                call.record.count(answer.prompt_tokens, 0)
            return answer
        return pb.EmbedResponse()

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("ListModels", grpc_context) as call:
            call.admit(request, self.router.limits)
            return pb.ListModelsResponse(models=[pb.Model(**card._asdict()) for card in self.router.cards()])
        return pb.ListModelsResponse()

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Of a model by its name; of the whole, every model ready, by the empty name or that of a service."""
        try:
            return Health(status=self._health(request.service))
        except ModelNotFoundError as error:
            tell(grpc_context, error)
            return Health()

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        """The status now and at every change."""
        last = None
        while True:
            try:
                status = self._health(request.service)
            except ModelNotFoundError:
                status = Health.SERVICE_UNKNOWN  # the protocol wants the watch to go on
            if status != last:
                yield Health(status=status)
                last = status
            await asyncio.sleep(HEALTH_POLL_S)

    def _call(self, method: str, grpc_context: Any, errors: Literal["returned", "raised"] = "returned") -> GrpcCall:
        return GrpcCall(self.calls, f"/{INFERENCE_SERVICE}/{method}", grpc_context, errors)

    def _generation(self, call: GrpcCall, request: Any, stream: bool) -> CompletionRequest | ChatRequest:
        call.admit(request, self.router.limits)
        record = generation_record(request, stream)
        call.record.about(record.model, logged_prompt(record))
        return record

    def _health(self, service: str) -> Any:
        ready = {card.id: card.ready for card in self.router.cards()}
        if service in ("", *SERVICES):
            return Health.SERVING if all(ready.values()) else Health.NOT_SERVING
        if service not in ready:
            raise ModelNotFoundError(f"service: found {service!r}, known are {', '.join((*SERVICES, *ready))}")
        return Health.SERVING if ready[service] else Health.NOT_SERVING


def logged_prompt(record: CompletionRequest | ChatRequest) -> Any:
    if isinstance(record, CompletionRequest):
        return record.prompt
    return [message.model_dump(exclude_unset=True) for message in record.messages]


def choice(index: int, piece: Completion | GenerationChunk, with_logprobs: bool) -> pb.Choice:
    """Of a piece of a completion `finish_reason` is unset but in the last one."""
    return pb.Choice(
        index=index,
        text=piece.text,
        finish_reason=piece.finish_reason,
        token_ids=piece.token_ids,
        logprobs=token_logprobs(piece.logprobs) if with_logprobs else (),
    )


def usage(call: GrpcCall) -> pb.Usage:
    prompt_tokens, completion_tokens = call.record.prompt_tokens, call.record.completion_tokens
    total = prompt_tokens + completion_tokens
    return pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
