"""The router's side of the KServe Open Inference Protocol: inference.GRPCInferenceService, as
`protos/open_inference.proto` describes it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from cluster.errors import InvalidRequestError, UnauthenticatedError
from deployments.api.calls import Call
from deployments.api.grpc.grpc_calls import GrpcCall, StreamFailedError, tell, telling
from deployments.api.grpc.grpc_records import json_object, json_value
from deployments.api.grpc.grpc_services import OPEN_INFERENCE_SERVICE, MalformedMessage, wellformed
from deployments.api.kserve.kserve_models import (
    MODEL_VERSION,
    OUTPUTS,
    TEXT_INPUTS,
    check_version,
    model_config,
    model_metadata,
    model_ready,
    model_statistics,
    repository_index,
    server_metadata,
)
from deployments.api.kserve.kserve_tensors import BYTES, Tensor, add_output, input_tensors, parameter_value
from deployments.api.operations import Operations
from deployments.api.requests.parsing import parse
from deployments.api.requests.schema import CompletionRequest
from deployments.error_statuses import public_message
from protos import open_inference_pb2 as pb

SAMPLING_PARAMETERS = "sampling_parameters"
# Triton's clients ask for an empty last response by it; the last one is marked here in any case.
IGNORED_PARAMETERS = ("triton_enable_empty_final_response",)
FINAL = "triton_final_response"

# Of CompletionRequest, what parameters and tensors may set; the rest would not fit the outputs.
STRING_FIELDS = ("stop", "grammar", "user")
OTHER_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "seed", "ignore_eos", "echo", "response_format", "stream",
)  # fmt: skip
NOT_ECHO = "exclude_input_in_output"
FIELDS = (*OTHER_FIELDS, *STRING_FIELDS, NOT_ECHO)


class InferRecord(NamedTuple):
    """A ModelInferRequest, understood."""

    completion: CompletionRequest
    shape: tuple[int, ...]  # of the input, and so of the outputs
    outputs: tuple[str, ...]
    raw: bool


class KserveApi:
    """Mixed into the ingress deployment beside GrpcApi: Serve finds a method by the RPC's name."""

    operations: Operations

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with telling(grpc_context):
            wellformed(request)
            return pb.ServerLiveResponse(live=True)
        return pb.ServerLiveResponse()

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with telling(grpc_context):
            wellformed(request)
            return pb.ServerReadyResponse(ready=not self.operations.not_ready())
        return pb.ServerReadyResponse()

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with telling(grpc_context):
            check_version(wellformed(request).version, "version")
            return pb.ModelReadyResponse(ready=model_ready(self.operations, request.name))
        return pb.ModelReadyResponse()

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("ServerMetadata", grpc_context) as call:
            call.admit(request, self.operations.limits)
            return server_metadata()
        return pb.ServerMetadataResponse()

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("ModelMetadata", grpc_context) as call:
            call.admit(request, self.operations.limits)
            call.record.about(request.name)
            return model_metadata(self.operations, request.name, request.version)
        return pb.ModelMetadataResponse()

    async def ModelConfig(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("ModelConfig", grpc_context) as call:
            call.admit(request, self.operations.limits)
            call.record.about(request.name)
            return pb.ModelConfigResponse(config=model_config(self.operations, request.name, request.version))
        return pb.ModelConfigResponse()

    async def ModelStatistics(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("ModelStatistics", grpc_context) as call:
            call.admit(request, self.operations.limits)
            return await model_statistics(self.operations, request.name, request.version)
        return pb.ModelStatisticsResponse()

    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("RepositoryIndex", grpc_context) as call:
            call.admit(request, self.operations.limits)
            return repository_index(self.operations, request)
        return pb.RepositoryIndexResponse()

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._kserve_call("ModelInfer", grpc_context) as call:
            record = self._infer_record(call, request)
            if record.completion.stream:
                raise InvalidRequestError("stream: allowed only in ModelStreamInfer", "stream")
            return await whole_response(self.operations, call.record, request, record)
        return pb.ModelInferResponse()

    async def ModelStreamInfer(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        """`request` is Serve's stream of the client's messages."""
        request_id: str | None = None
        calls, method = self.operations.calls, method_name("ModelStreamInfer")
        async for message in request:
            with GrpcCall(calls, method, grpc_context, "kept", request_id) as call:
                request_id = call.request_id  # one for the whole stream
                record = self._infer_record(call, message)
                async with aclosing(self._responses(call, message, record)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            if isinstance(call.error, UnauthenticatedError):
                tell(grpc_context, call.error)
                raise StreamFailedError
            if call.error is not None:
                nothing = pb.ModelInferResponse() if isinstance(message, MalformedMessage) else response_to(message)
                nothing.parameters[FINAL].bool_param = True
                yield pb.ModelStreamInferResponse(error_message=public_message(call.error), infer_response=nothing)

    async def _responses(
        self, call: GrpcCall, request: pb.ModelInferRequest, record: InferRecord
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """Those to one request of a stream, the last marked."""
        completion = record.completion
        if not completion.stream:
            response = await whole_response(self.operations, call.record, request, record)
            response.parameters[FINAL].bool_param = True
            yield response
            return
        prompts = completion.prompts()
        if len(prompts) > 1:
            found = f"{TEXT_INPUTS[0]}: found {len(prompts)} strings"
            raise InvalidRequestError(f"{found}; with stream true, allowed is one a request", TEXT_INPUTS[0])
        async with aclosing(self.operations.begin(call.record, completion, call.request_id)) as generation:
            async for _, chunk in generation:
                response = infer_response(request, record, [chunk.text], [chunk.finish_reason or ""])
                response.parameters[FINAL].bool_param = generation.complete
                if generation.complete:
                    add_usage(response, call.record)
                yield response

    def _kserve_call(self, method: str, grpc_context: Any) -> GrpcCall:
        return GrpcCall(self.operations.calls, method_name(method), grpc_context)

    def _infer_record(self, call: GrpcCall, request: pb.ModelInferRequest) -> InferRecord:
        call.admit(request, self.operations.limits)
        call.record.about(request.model_name)  # also of a request that is refused next
        return infer_record(request)


async def whole_response(
    operations: Operations, call: Call, request: pb.ModelInferRequest, record: InferRecord
) -> pb.ModelInferResponse:
    """With all that is generated."""
    whole = await operations.generate(call, record.completion, call.request_id)
    response = infer_response(request, record, [each.text for each in whole], [each.finish_reason for each in whole])
    add_usage(response, call)
    return response


def method_name(method: str) -> str:
    return f"/{OPEN_INFERENCE_SERVICE}/{method}"


def infer_record(request: pb.ModelInferRequest) -> InferRecord:
    """Raises InvalidRequestError."""
    check_version(request.model_version, "model_version")
    tensors = input_tensors(request)
    given = [name for name in TEXT_INPUTS if name in tensors]
    if len(given) != 1:
        raise InvalidRequestError(
            f"text_input: found {' and '.join(given) or 'no text'}; exactly one of the BYTES tensors"
            f" {' and '.join(TEXT_INPUTS)} is needed",
            TEXT_INPUTS[0],
        )
    text = tensors.pop(given[0])
    if text.datatype != BYTES or not text.values:
        found = f"{text.name}: found {len(text.values)} elements of {text.datatype}"
        raise InvalidRequestError(f"{found}, expected BYTES, one string and more", text.name)
    body = {"model": request.model_name, "prompt": text.values[0] if len(text.values) == 1 else text.values}
    completion = parse(CompletionRequest, body | given_fields(request, tensors))
    return InferRecord(completion, text.shape, wanted_outputs(request), bool(request.raw_input_contents))


def given_fields(request: pb.ModelInferRequest, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What parameters, tensors and `sampling_parameters` set. Raises InvalidRequestError for a name that is unknown or
    given twice."""
    given = [
        (name, parameter_value(name, parameter))
        for name, parameter in sorted(request.parameters.items())
        if name not in IGNORED_PARAMETERS
    ]
    given += [(name, tensor.values if name == "stop" else tensor.single()) for name, tensor in tensors.items()]
    fields: dict[str, Any] = {}
    for name, value in given:
        if name != SAMPLING_PARAMETERS:
            set_field(fields, name, value)
        elif isinstance(value, str):
            for inner, inner_value in json_object(value, SAMPLING_PARAMETERS).items():
                set_field(fields, inner, inner_value)
        else:
            raise InvalidRequestError(f"{name}: found {value!r}, expected a JSON object as a string", name)
    return fields


def set_field(fields: dict[str, Any], name: str, value: Any) -> None:
    if name not in FIELDS:
        raise InvalidRequestError(
            f"{name}: not supported; allowed are {', '.join((*FIELDS, SAMPLING_PARAMETERS))}", name
        )
    if isinstance(value, str) and name not in STRING_FIELDS:
        value = json_value(value, name)  # vLLM's clients write {"temperature": "0.1"}
    if name == NOT_ECHO:
        if not isinstance(value, bool):
            raise InvalidRequestError(f"{name}: found {value!r}, expected a boolean", name)
        name, value = "echo", not value
    if name in fields:
        raise InvalidRequestError(f"{name}: given twice", name)
    fields[name] = value


def wanted_outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    for output in request.outputs:
        if output.name not in OUTPUTS:
            found = f"outputs: found {output.name!r}"
            raise InvalidRequestError(f"{found}, allowed are {' and '.join(OUTPUTS)}", "outputs")
        for name in output.parameters:
            raise InvalidRequestError(f"outputs: {output.name}: parameter {name}: not supported", "outputs")
    return tuple(output.name for output in request.outputs) or OUTPUTS


def response_to(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(model_name=request.model_name, model_version=MODEL_VERSION, id=request.id)


def infer_response(
    request: pb.ModelInferRequest, record: InferRecord, texts: list[str], finish_reasons: list[Any]
) -> pb.ModelInferResponse:
    response = response_to(request)
    for name in record.outputs:
        add_output(response, name, record.shape, texts if name == OUTPUTS[0] else finish_reasons, record.raw)
    return response


def add_usage(response: pb.ModelInferResponse, record: Call) -> None:
    response.parameters["prompt_tokens"].int64_param = record.prompt_tokens
    response.parameters["completion_tokens"].int64_param = record.completion_tokens
