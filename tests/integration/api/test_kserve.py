"""The KServe Open Inference Protocol of a running cluster."""

from __future__ import annotations

import base64
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import httpx
import pytest

from protos import open_inference_pb2 as pb
from protos.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.integration.api.reflected import ReflectedService
from tests.integration.counters import counters_of, until
from tests.integration.processes import Served

TIMEOUT_S = 60
PROMPT = "Q: What is CPU? A:"
SAMPLED = {"max_tokens": 24, "temperature": 1.5, "seed": 11}


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return GRPCInferenceServiceStub(channel)


def ask(*texts: str, model: str = "llama", id: str = "", raw: bool = False, **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    data = [text.encode() for text in texts]
    if raw:
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in data))
    else:
        tensor.contents.bytes_contents.extend(data)
    for name, value in parameters.items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], field, value)
    return request


def texts_of(response: pb.ModelInferResponse) -> list[str]:
    outputs = {output.name: output.contents.bytes_contents for output in response.outputs}
    return [text.decode() for text in outputs["text_output"]]


def by_http(served: Served, prompts: Sequence[str], **fields: Any) -> list[str]:
    body = {"model": "llama", "prompt": list(prompts), **SAMPLED, **fields}
    response = httpx.post(f"{served.http}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def final(response: pb.ModelStreamInferResponse) -> bool:
    return bool(response.infer_response.parameters["triton_final_response"].bool_param)


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, "CPU"]])
def test_texts_equal_http_for_a_seed(served: Served, stub: Any, prompts: list[str]) -> None:
    expected = by_http(served, prompts)
    response = stub.ModelInfer(ask(*prompts, id="7", **SAMPLED), timeout=TIMEOUT_S)
    assert (response.id, texts_of(response)) == ("7", expected)
    raw = stub.ModelInfer(ask(*prompts, raw=True, **SAMPLED), timeout=TIMEOUT_S)
    assert raw.raw_output_contents[0] == b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in expected)


def test_a_stream_goes_both_ways(served: Served, stub: Any) -> None:
    """The client sends its second request when it has the whole answer to the first."""
    longer = {"max_tokens": 400, "ignore_eos": True}  # than what a server that is held up makes in one message
    (long_text,), (short_text,) = by_http(served, [PROMPT], **longer), by_http(served, [PROMPT])
    answered = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield ask(PROMPT, id="1", stream=True, **SAMPLED | longer)
        assert answered.wait(TIMEOUT_S)
        yield ask(PROMPT, id="2", colour="red")
        yield ask(PROMPT, id="3", **SAMPLED)

    found: dict[str, list[pb.ModelStreamInferResponse]] = {"1": [], "2": [], "3": []}
    for response in stub.ModelStreamInfer(requests(), timeout=TIMEOUT_S):
        found[response.infer_response.id].append(response)
        if found["1"] and final(found["1"][-1]):
            answered.set()
    assert len(found["1"]) > 1
    assert [final(response) for response in found["1"]] == [False] * (len(found["1"]) - 1) + [True]
    assert "".join(texts_of(response.infer_response)[0] for response in found["1"]) == long_text
    assert [response.error_message.partition(":")[0] for response in found["2"]] == ["colour"]
    assert [texts_of(response.infer_response) for response in found["3"]] == [[short_text]]


def test_errors_have_canonical_codes(stub: Any) -> None:
    for request, code in (
        (ask(PROMPT, model="gpt-5"), grpc.StatusCode.NOT_FOUND),
        (ask(PROMPT, temperature=3.0), grpc.StatusCode.INVALID_ARGUMENT),
        (ask("CPU " * 2000), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request, timeout=TIMEOUT_S)
        assert error.value.code() == code
        assert "Traceback" not in error.value.details()


def test_a_client_that_leaves_a_stream_stops_the_engine(served: Served, stub: Any) -> None:
    request = ask(PROMPT, model="bloom", stream=True, max_tokens=480, ignore_eos=True)
    with counters_of(served) as counters:
        for _ in range(5):  # a client that is held up may find that all was made meanwhile
            before = counters("bloom")
            responses = stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S)
            next(responses)
            responses.cancel()
            ended = before["cancelled"] + 1, before["generated_tokens"] + 480
            after = until(
                counters,
                "bloom",
                lambda now, ended=ended: now["cancelled"] == ended[0] or now["generated_tokens"] == ended[1],
            )
            if after["cancelled"] > before["cancelled"]:
                break
        assert after["cancelled"] > before["cancelled"]
        assert after["generated_tokens"] - before["generated_tokens"] < 480
        assert counters("bloom")["generated_tokens"] == after["generated_tokens"]


def test_what_the_server_says_of_itself(stub: Any) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live
    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="llama"), timeout=TIMEOUT_S).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=TIMEOUT_S).name == "nibble"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="llama"), timeout=TIMEOUT_S)
    assert [tensor.name for tensor in metadata.inputs] == ["text_input"]


def test_a_client_that_knows_reflection_alone(served: Served, channel: grpc.Channel) -> None:
    service = ReflectedService(channel, "inference.GRPCInferenceService")
    text = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    request = {
        "model_name": "llama",
        "inputs": [text | {"contents": {"bytes_contents": [base64.b64encode(PROMPT.encode()).decode()]}}],
        "parameters": {
            "max_tokens": {"int64_param": 24},
            "temperature": {"double_param": 1.5},
            "seed": {"int64_param": 11},
        },
    }
    expected = by_http(served, [PROMPT])
    for response in (
        *service.call("ModelInfer", request),
        *(each["infer_response"] for each in service.call("ModelStreamInfer", request)),
    ):
        (data,) = response["outputs"][0]["contents"]["bytes_contents"]
        assert [base64.b64decode(data).decode()] == expected
