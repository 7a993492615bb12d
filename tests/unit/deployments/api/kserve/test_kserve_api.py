from __future__ import annotations

import json
import logging
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from cluster.config import AuthConfig
from cluster.errors import QueueFullError
from deployments.api.grpc.grpc_services import MalformedMessage
from deployments.api.kserve.kserve_api import KserveApi
from deployments.api.kserve.kserve_tensors import DATATYPES
from protos import open_inference_pb2 as pb
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import Context, api_of, drained, log_lines

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def api(model: EchoModel) -> KserveApi:
    return api_of(model)


def packed(texts: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def ask(
    *texts: bytes, raw: bool = False, parameters: dict[str, Any] | None = None, shape: Sequence[int] = (), **fields: Any
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(**{"model_name": "echo", **fields})
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=shape or [len(texts)])
    if raw:
        request.raw_input_contents.append(packed(texts))
    else:
        tensor.contents.bytes_contents.extend(texts)
    for name, value in (parameters or {}).items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], field, value)
    return request


def with_tensor(request: pb.ModelInferRequest, name: str, datatype: str, values: list[Any]) -> pb.ModelInferRequest:
    tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, DATATYPES[datatype][0]).extend(values)
    return request


def outputs(response: pb.ModelInferResponse) -> dict[str, tuple[list[int], list[bytes]]]:
    return {each.name: (list(each.shape), list(each.contents.bytes_contents)) for each in response.outputs}


async def stream(api: KserveApi, *requests: pb.ModelInferRequest, context: Context | None = None) -> list[Any]:
    async def messages() -> AsyncIterator[pb.ModelInferRequest]:
        for request in requests:
            yield request

    return await drained(api.ModelStreamInfer(messages(), context := context or Context()), context)


def final(response: pb.ModelStreamInferResponse) -> bool:
    return bool(response.infer_response.parameters["triton_final_response"].bool_param)


async def test_one_text_in_and_out(api: KserveApi) -> None:
    context = Context(x_request_id="mine")
    response = await api.ModelInfer(ask(b"to be", id="7"), context)
    assert outputs(response) == {"text_output": ([1], [b"to be "]), "finish_reason": ([1], [b"stop"])}
    assert (response.model_name, response.model_version, response.id) == ("echo", "1", "7")
    assert response.parameters["completion_tokens"].int64_param == 2
    assert (context.code, context.trailing) == (None, {"x-request-id": "mine"})


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (2, 1)])
@pytest.mark.parametrize("raw", [False, True])
async def test_batches_keep_their_shape_and_form(
    api: KserveApi, model: EchoModel, shape: tuple[int, ...], raw: bool
) -> None:
    texts = [b"to be", "or nöt".encode()][: shape[0]]
    response = await api.ModelInfer(ask(*texts, shape=shape, raw=raw), Context())
    assert [request.prompt for request in model.requests] == [text.decode() for text in texts]
    assert [(each.name, list(each.shape)) for each in response.outputs] == [
        ("text_output", list(shape)),
        ("finish_reason", list(shape)),
    ]
    expected = [text + b" " for text in texts]
    if raw:
        assert list(response.raw_output_contents) == [packed(expected), packed([b"stop"] * len(texts))]
        assert not any(each.HasField("contents") for each in response.outputs)
    else:
        assert outputs(response)["text_output"][1] == expected
        assert not response.raw_output_contents


async def test_the_text_may_be_called_prompt_and_outputs_chosen(api: KserveApi) -> None:
    request = ask(b"to be")
    request.inputs[0].name = "prompt"
    request.outputs.add(name="finish_reason")
    assert outputs(await api.ModelInfer(request, Context())) == {"finish_reason": ([1], [b"stop"])}


SAMPLING = {"max_tokens": 7, "temperature": 0.5, "top_k": 3, "seed": 5, "stop": "x", "ignore_eos": True, "echo": True}


def by_parameters() -> pb.ModelInferRequest:
    return ask(b"a", parameters=SAMPLING)


def by_tensors() -> pb.ModelInferRequest:
    request = ask(b"a")
    for name, datatype in (("max_tokens", "INT32"), ("top_k", "UINT8"), ("seed", "UINT64")):
        with_tensor(request, name, datatype, [SAMPLING[name]])
    for name in ("ignore_eos", "echo"):
        with_tensor(request, name, "BOOL", [True])
    return with_tensor(with_tensor(request, "temperature", "FP32", [0.5]), "stop", "BYTES", [b"x"])


def by_json_parameter() -> pb.ModelInferRequest:
    return ask(b"a", parameters={"sampling_parameters": json.dumps(SAMPLING)})


def by_json_tensor_of_strings() -> pb.ModelInferRequest:
    """As vLLM's example client writes them."""
    strings = {
        name: value if name == "stop" else json.dumps(value) for name, value in SAMPLING.items() if name != "echo"
    }
    request = with_tensor(ask(b"a"), "sampling_parameters", "BYTES", [json.dumps(strings).encode()])
    return with_tensor(request, "exclude_input_in_output", "BOOL", [False])


@pytest.mark.parametrize("request_of", [by_parameters, by_tensors, by_json_parameter, by_json_tensor_of_strings])
async def test_sampling_fields_in_every_form(api: KserveApi, model: EchoModel, request_of: Any) -> None:
    context = Context()
    await api.ModelInfer(request_of(), context)
    assert context.code is None, context.details
    (request,) = model.requests
    assert (request.max_tokens, request.stop, request.ignore_eos, request.echo) == (7, ("x",), True, True)
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 5)


async def test_several_stop_strings(api: KserveApi, model: EchoModel) -> None:
    await api.ModelInfer(with_tensor(ask(b"a"), "stop", "BYTES", [b"x", b"[y"]), Context())
    await api.ModelInfer(ask(b"a", parameters={"sampling_parameters": '{"stop": ["x", "[y"]}'}), Context())
    await api.ModelInfer(ask(b"a", parameters={"stop": "[y"}), Context())
    assert [request.stop for request in model.requests] == [("x", "[y"), ("x", "[y"), ("[y",)]


def contents(request: pb.ModelInferRequest, **fields: Any) -> pb.ModelInferRequest:
    request.inputs[0].contents.CopyFrom(pb.InferTensorContents(**fields))
    return request


def raw(*data: bytes, **fields: Any) -> pb.ModelInferRequest:
    request = ask(b"a", **fields)
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.extend(data)
    return request


def with_datatype(request: pb.ModelInferRequest, datatype: str) -> pb.ModelInferRequest:
    request.inputs[0].datatype = datatype
    return request


def with_output(request: pb.ModelInferRequest, name: str, *parameters: str) -> pb.ModelInferRequest:
    output = request.outputs.add(name=name)
    for parameter in parameters:
        output.parameters[parameter].bool_param = True
    return request


def with_input_parameter(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    return request


def without_value(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    request.parameters["seed"].SetInParent()
    return request


ERRORS = [
    (ask(b"a", model_name="gpt"), grpc.StatusCode.NOT_FOUND, "served are"),
    (ask(b"a", model_name="absent"), grpc.StatusCode.UNAVAILABLE, "no replica"),
    (ask(b"a", model_version="2"), INVALID, "model_version: found '2'"),
    (pb.ModelInferRequest(model_name="echo"), INVALID, "text_input: found no text"),
    (with_tensor(ask(b"a"), "prompt", "BYTES", [b"b"]), INVALID, "text_input: found text_input and prompt"),
    (ask(), INVALID, "text_input: found 0 elements"),
    (with_datatype(contents(ask(b"a"), int_contents=[1]), "INT32"), INVALID, "text_input: found 1 elements of INT32"),
    (with_datatype(ask(b"a"), "STRING"), INVALID, "text_input: datatype: found 'STRING'"),
    (contents(ask(b"a"), int_contents=[1]), INVALID, "text_input: contents: found int_contents"),
    (ask(b"a", shape=[2]), INVALID, "text_input: shape: found [2]"),
    (ask(b"a", shape=[-1, -1]), INVALID, "text_input: shape: found [-1, -1]"),
    (ask(b"\xff"), INVALID, "text_input: not valid UTF-8"),
    (with_input_parameter(ask(b"a")), INVALID, "text_input: parameter shared_memory_region"),
    (raw(b"\5\0\0\0abc"), INVALID, "text_input: raw_input_contents: ends within"),
    (raw(b"\0\0"), INVALID, "text_input: raw_input_contents: ends within"),
    (raw(packed([b"a"]), packed([b"b"])), INVALID, "raw_input_contents: found 2 for 1 inputs"),
    (with_datatype(raw(b"\0\0\0"), "INT16"), INVALID, "text_input: raw_input_contents: found 3 bytes"),
    (contents(ask(b"a", raw=True), bytes_contents=[b"a"]), INVALID, "text_input: found both"),
    (with_tensor(ask(b"a"), "colour", "INT32", [1]), INVALID, "colour: not supported"),
    (with_tensor(ask(b"a"), "text_input", "BYTES", [b"b"]), INVALID, "text_input: found twice"),
    (with_tensor(ask(b"a"), "seed", "INT32", [1, 2]), INVALID, "seed: found 2 elements"),
    (with_tensor(ask(b"a", parameters={"seed": 1}), "seed", "INT32", [1]), INVALID, "seed: given twice"),
    (with_tensor(ask(b"a"), "max_tokens", "FP32", [2.5]), INVALID, "max_tokens: found 2.5"),
    (ask(b"a", parameters={"colour": "red"}), INVALID, "colour: not supported"),
    (ask(b"a", parameters={"n": 2}), INVALID, "n: not supported"),
    (ask(b"a", parameters={"temperature": 9.0}), INVALID, "temperature: found 9.0"),
    (ask(b"a", parameters={"max_tokens": "many"}), INVALID, "max_tokens: not valid JSON"),
    (ask(b"a", parameters={"exclude_input_in_output": 1}), INVALID, "exclude_input_in_output: found 1"),
    (ask(b"a", parameters={"sampling_parameters": "{"}), INVALID, "sampling_parameters: not valid JSON"),
    (ask(b"a", parameters={"sampling_parameters": 1}), INVALID, "sampling_parameters: found 1"),
    (ask(b"a", parameters={"sampling_parameters": '{"prompt": 1}'}), INVALID, "prompt: not supported"),
    (without_value(ask(b"a")), INVALID, "seed: found a parameter without a value"),
    (with_output(ask(b"a"), "logits"), INVALID, "outputs: found 'logits'"),
    (
        with_output(ask(b"a"), "text_output", "classification"),
        INVALID,
        "outputs: text_output: parameter classification",
    ),
]


@pytest.mark.parametrize(("request_", "code", "words"), ERRORS, ids=[words for _, _, words in ERRORS])
async def test_errors_name_what_is_wrong_and_a_stream_goes_on(
    api: KserveApi, request_: pb.ModelInferRequest, code: grpc.StatusCode, words: str
) -> None:
    context, stream_context = Context(), Context()
    assert await api.ModelInfer(request_, context) == pb.ModelInferResponse()
    assert (context.code, context.details.startswith(words) or words in context.details) == (code, True)
    request_.id = "wrong"
    refused, answered = await stream(api, request_, ask(b"a", id="right"), context=stream_context)
    assert (refused.error_message, refused.infer_response.id, final(refused)) == (context.details, "wrong", True)
    assert (answered.error_message, answered.infer_response.id, final(answered)) == ("", "right", True)
    assert stream_context.code is None


async def test_a_message_of_a_stream_that_could_not_be_parsed_is_refused_alone(api: KserveApi) -> None:
    malformed: Any = MalformedMessage("inference.ModelInferRequest")
    refused, *_, last = await stream(api, malformed, ask(b"a b", id="right"))
    assert (refused.error_message.partition(":")[0], final(refused)) == ("message", True)
    assert (last.error_message, last.infer_response.id, final(last)) == ("", "right", True)


async def test_a_stream_of_pieces(api: KserveApi, model: EchoModel) -> None:
    whole = ask(b"not to", id="2")
    pieces = with_tensor(ask(b"to be or", id="1"), "stream", "BOOL", [True])
    responses = await stream(api, pieces, whole, ask(b"be", id="3", parameters={"stream": True}))
    found = [(r.infer_response.id, outputs(r.infer_response)["text_output"][1], final(r)) for r in responses]
    assert found == [
        ("1", [b"to "], False),
        ("1", [b"be "], False),
        ("1", [b"or "], True),
        ("2", [b"not to "], True),
        ("3", [b"be "], True),
    ]
    reasons = [outputs(response.infer_response)["finish_reason"][1] for response in responses]
    assert reasons == [[b""], [b""], [b"stop"], [b"stop"], [b"stop"]]
    assert responses[2].infer_response.parameters["prompt_tokens"].int64_param == 3
    assert model.closed == 3


async def test_pieces_only_of_one_text_and_only_in_a_stream(api: KserveApi, model: EchoModel) -> None:
    context = Context()
    await api.ModelInfer(ask(b"a", parameters={"stream": True}), context)
    assert (context.code, context.details) == (INVALID, "stream: allowed only in ModelStreamInfer")
    (response,) = await stream(api, ask(b"a", b"b", parameters={"stream": True}))
    assert response.error_message.startswith("text_input: found 2 strings")
    assert model.requests == []


async def test_an_error_in_the_midst_of_a_stream(api: KserveApi, model: EchoModel) -> None:
    model.error, model.error_at = QueueFullError("full"), 1
    pieces = {"stream": True, "triton_enable_empty_final_response": True}
    responses = await stream(api, ask(b"a b", parameters=pieces), ask(b"c", parameters=pieces))
    assert [(response.error_message, final(response)) for response in responses] == [
        ("", False),
        ("full", True),
        ("", True),
    ]


async def test_a_client_that_leaves_a_stream_ends_the_generation(api: KserveApi, model: EchoModel) -> None:
    async def messages() -> AsyncIterator[pb.ModelInferRequest]:
        yield ask(b"a b", parameters={"stream": True})

    responses = api.ModelStreamInfer(messages(), Context())
    await anext(responses)
    await responses.aclose()
    assert model.closed == 1


async def test_keys_limits_and_the_log(model: EchoModel, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve.requests")
    file = tmp_path / "keys.yaml"
    file.write_text("[]")
    closed, small = api_of(model, AuthConfig(api_keys_file=file)), api_of(model, body_bytes=60)
    context, stream_context, size_context = Context(), Context(), Context()
    await closed.ModelInfer(ask(b"a"), context)
    assert await stream(closed, ask(b"a"), ask(b"b"), context=stream_context) == []
    assert context.code == stream_context.code == grpc.StatusCode.UNAUTHENTICATED
    assert (await closed.ServerReady(pb.ServerReadyRequest(), Context())).ready is False
    await small.ModelInfer(ask(b"a" * 60), size_context)
    assert (size_context.code, "limits.body_bytes" in size_context.details) == (INVALID, True)
    await stream(small, ask(b"a"), ask(b"b" * 60), context=Context(x_request_id="mine"))
    assert [(line["request_id"] == "mine", line["status"], line["model"]) for line in log_lines(caplog)] == [
        (False, "UNAUTHENTICATED", None),
        (False, "UNAUTHENTICATED", None),
        (False, "INVALID_ARGUMENT", None),
        (True, "OK", "echo"),
        (True, "INVALID_ARGUMENT", None),
    ]
    assert {line["method"].partition("/Model")[0] for line in log_lines(caplog)} == {"/inference.GRPCInferenceService"}


async def test_what_the_server_and_a_model_say_of_themselves(api: KserveApi) -> None:
    assert (await api.ServerLive(pb.ServerLiveRequest(), Context())).live
    assert not (await api.ServerReady(pb.ServerReadyRequest(), Context())).ready
    assert (await api.ModelReady(pb.ModelReadyRequest(name="echo"), Context())).ready
    assert not (await api.ModelReady(pb.ModelReadyRequest(name="absent"), Context())).ready
    assert (await api.ServerMetadata(pb.ServerMetadataRequest(), Context())).name == "nibble"
    metadata = await api.ModelMetadata(pb.ModelMetadataRequest(name="echo", version="1"), Context())
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("echo", ["1"], "nibble_bigdl")
    assert [(each.name, each.datatype, list(each.shape)) for each in (*metadata.inputs, *metadata.outputs)] == [
        ("text_input", "BYTES", [-1]),
        ("text_output", "BYTES", [-1]),
        ("finish_reason", "BYTES", [-1]),
    ]
    for method, request, missing in (
        (api.ModelReady, pb.ModelReadyRequest, None),
        (api.ModelMetadata, pb.ModelMetadataRequest, grpc.StatusCode.NOT_FOUND),
    ):
        for fields, code in (({"name": "gpt"}, missing), ({"name": "echo", "version": "2"}, INVALID)):
            await method(request(**fields), context := Context())
            assert context.code == code


async def test_a_model_that_is_not_there_is_not_ready(api: KserveApi) -> None:
    for name in ("gpt", ""):
        assert not (await api.ModelReady(pb.ModelReadyRequest(name=name), context := Context())).ready
        assert context.code is None
