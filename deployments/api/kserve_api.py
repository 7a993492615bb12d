"""The router's side of the KServe Open Inference Protocol: inference.GRPCInferenceService, as
`protos/open_inference.proto` describes it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, NamedTuple

from cluster.errors import InvalidRequestError, NibbleError, UnauthenticatedError
from deployments.api.calls import Calls
from deployments.api.grpc_calls import GrpcCall, StreamFailedError, tell
from deployments.api.grpc_records import json_object, json_value
from deployments.api.kserve_tensors import BYTES, Tensor, add_output, input_tensors, parameter_value
from deployments.api.parsing import parse
from deployments.api.schema import CompletionRequest
from deployments.routing.router import Router, collect
from deployments.status import public_message
from protos import open_inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
MODEL_VERSION = "1"
TEXT_INPUTS = ("text_input", "prompt")
OUTPUTS = ("text_output", "finish_reason")
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

    router: Router
    calls: Calls

    async def ServerLive(self, request: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=not self.router.not_ready())

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        try:
            check_version(request.version, "version")
            return pb.ModelReadyResponse(ready=self.router.card(request.name).ready)
        except NibbleError as error:
            tell(grpc_context, error)
            return pb.ModelReadyResponse()

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("ServerMetadata", grpc_context) as call:
            call.admit(request, self.router.limits)
            return pb.ServerMetadataResponse(name="nibble", version=version("nibble-serve"), extensions=["parameters"])
        return pb.ServerMetadataResponse()

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("ModelMetadata", grpc_context) as call:
            call.admit(request, self.router.limits)
            call.record.about(request.name)
            check_version(request.version, "version")
            card = self.router.card(request.name)
            tensor = pb.ModelMetadataResponse.TensorMetadata
            return pb.ModelMetadataResponse(
                name=card.id,
                versions=[MODEL_VERSION],
                platform=f"nibble_{card.engine}",
                inputs=[tensor(name=TEXT_INPUTS[0], datatype=BYTES, shape=[-1])],
                outputs=[tensor(name=name, datatype=BYTES, shape=[-1]) for name in OUTPUTS],
            )
        return pb.ModelMetadataResponse()

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        with self._call("ModelInfer", grpc_context) as call:
            record = self._infer_record(call, request)
            if record.completion.stream:
                raise InvalidRequestError("stream: allowed only in ModelStreamInfer", "stream")
            return await self._whole(call, request, record)
        return pb.ModelInferResponse()

    async def ModelStreamInfer(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        """`request` is Serve's stream of the client's messages."""
        request_id: str | None = None
        async for message in request:
            with GrpcCall(self.calls, method_name("ModelStreamInfer"), grpc_context, "kept", request_id) as call:
                request_id = call.request_id  # one for the whole stream
                record = self._infer_record(call, message)
                async with aclosing(self._responses(call, message, record)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            if isinstance(call.error, UnauthenticatedError):
                tell(grpc_context, call.error)
                raise StreamFailedError
            if call.error is not None:
                nothing = response_to(message)
                nothing.parameters[FINAL].bool_param = True
                yield pb.ModelStreamInferResponse(error_message=public_message(call.error), infer_response=nothing)

    async def _responses(
        self, call: GrpcCall, request: pb.ModelInferRequest, record: InferRecord
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """Those to one request of a stream, the last marked."""
        completion = record.completion
        if not completion.stream:
            response = await self._whole(call, request, record)
            response.parameters[FINAL].bool_param = True
            yield response
            return
        requests = completion.completions(call.request_id, self.router.limits)
        if len(requests) > 1:
            found = f"{TEXT_INPUTS[0]}: found {len(requests)} strings"
            raise InvalidRequestError(f"{found}; with stream true, allowed is one a request", TEXT_INPUTS[0])
        async with aclosing(call.record.counted(self.router.generate(completion.model, requests), 1)) as chunks:
            async for _, chunk in chunks:
                response = infer_response(request, record, [chunk.text], [chunk.finish_reason or ""])
                last = chunk.finish_reason is not None
                response.parameters[FINAL].bool_param = last
                if last:
                    add_usage(response, call)
                yield response

    async def _whole(self, call: GrpcCall, request: pb.ModelInferRequest, record: InferRecord) -> pb.ModelInferResponse:
        completion = record.completion
        requests = completion.completions(call.request_id, self.router.limits)
        every = await collect(call.record.counted(self.router.generate(completion.model, requests), 1), len(requests))
        response = infer_response(
            request, record, [each.text for each in every], [each.finish_reason for each in every]
        )
        add_usage(response, call)
        return response

    def _call(self, method: str, grpc_context: Any) -> GrpcCall:
        return GrpcCall(self.calls, method_name(method), grpc_context)

    def _infer_record(self, call: GrpcCall, request: pb.ModelInferRequest) -> InferRecord:
        call.admit(request, self.router.limits)
        call.record.about(request.model_name)
        record = infer_record(request)
        call.record.about(request.model_name, record.completion.prompt)
        return record


def method_name(method: str) -> str:
    return f"/{SERVICE}/{method}"


def check_version(found: str, field: str) -> None:
    if found not in ("", MODEL_VERSION):
        raise InvalidRequestError(f"{field}: found {found!r}, allowed are the empty one and {MODEL_VERSION!r}", field)


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


def add_usage(response: pb.ModelInferResponse, call: GrpcCall) -> None:
    response.parameters["prompt_tokens"].int64_param = call.record.prompt_tokens
    response.parameters["completion_tokens"].int64_param = call.record.completion_tokens
