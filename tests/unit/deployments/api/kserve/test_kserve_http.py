from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.operations import Operations
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import http_api

ECHO = "/v2/models/echo"


def infer_body(*texts: str, **fields: Any) -> dict[str, Any]:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return {"inputs": [tensor], **fields}


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    for path, status, body in (
        ("/v2/health/ready", 503, {"ready": False}),  # one of the models has no replica
        (f"{ECHO}/ready", 200, {"name": "echo", "ready": True}),
        (f"{ECHO}/versions/1/ready", 200, {"name": "echo", "ready": True}),
        ("/v2/models/absent/ready", 503, {"name": "absent", "ready": False}),
        ("/v2/models/org/none/ready", 503, {"name": "org/none", "ready": False}),
    ):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (status, body)
    assert client.get(f"{ECHO}/versions/2/ready").status_code == 400


def test_what_the_server_and_a_model_say_of_themselves(client: TestClient) -> None:
    assert client.get("/v2").json()["name"] == "nibble"
    text = {"datatype": "BYTES", "shape": [-1]}
    for path in (ECHO, f"{ECHO}/versions/1"):
        assert client.get(path).json() == {
            "name": "echo",
            "versions": ["1"],
            "platform": "nibble_bigdl",
            "inputs": [{"name": "text_input", **text}],
            "outputs": [{"name": "text_output", **text}, {"name": "finish_reason", **text}],
        }
    answer = client.get("/v2/models/gpt")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("model: ")


def test_texts_in_and_out(client: TestClient, model: EchoModel) -> None:
    sampling = {"max_tokens": 7, "temperature": 0.5, "seed": 5, "stop": ["x", "y"], "binary_data_output": True}
    answer = client.post(f"{ECHO}/infer", json=infer_body("to be", "or nöt", id="7", parameters=sampling))
    assert answer.status_code == 200
    found = answer.json()
    assert found["outputs"] == [
        {"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["to be ", "or nöt "]},
        {"name": "finish_reason", "datatype": "BYTES", "shape": [2], "data": ["stop", "stop"]},
    ]
    assert (found["model_name"], found["model_version"], found["id"]) == ("echo", "1", "7")
    assert found["parameters"]["completion_tokens"] == 4
    first = model.requests[0]
    assert (first.max_tokens, first.sampling.temperature, first.stop) == (7, 0.5, ("x", "y"))


def test_fields_may_be_tensors_data_nested_and_outputs_chosen(client: TestClient, model: EchoModel) -> None:
    body = infer_body("to be")
    body["inputs"][0] |= {"shape": [1, 1], "data": [["to be"]]}
    body["inputs"].append({"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [3]})
    body["outputs"] = [{"name": "text_output", "parameters": {"binary_data": False}}]
    found = client.post(f"{ECHO}/versions/1/infer", json=body).json()
    assert found["outputs"] == [{"name": "text_output", "datatype": "BYTES", "shape": [1, 1], "data": ["to be "]}]
    assert model.requests[0].max_tokens == 3


def test_generate_as_triton_and_kserve_have_it(client: TestClient, model: EchoModel) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    for body in (
        {"text_input": "to be", "max_tokens": 5, "stop": ["x"], "response_format": schema},
        {"text_input": "to be", "parameters": {"max_tokens": 5, "stop": ["x"], "response_format": schema}},
    ):
        assert client.post(f"{ECHO}/generate", json=body).json() == {
            "model_name": "echo",
            "model_version": "1",
            "text_output": "to be ",
            "finish_reason": "stop",
        }
        request = model.requests.pop()
        assert (request.prompt, request.max_tokens, request.stop) == ("to be", 5, ("x",))
        assert request.grammar is not None


def test_generate_streams_an_event_a_piece(client: TestClient) -> None:
    answer = client.post(f"{ECHO}/generate_stream", json={"text_input": "to be or"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    events = [json.loads(block.removeprefix("data: ")) for block in blocks]
    assert "".join(event["text_output"] for event in events) == "to be or "
    assert [event["finish_reason"] for event in events][-1] == "stop"
    assert len(events) > 1
    assert client.post("/v2/models/gpt/generate_stream", json={"text_input": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("infer", [], "body: expected a JSON object"),
        ("infer", {"inputs": 1}, "inputs: found 1, allowed is a list of objects"),
        ("infer", {}, "text_input: found no text"),
        ("infer", infer_body("a", extra=1), "extra: not supported; allowed are id, parameters, inputs, outputs"),
        ("infer", infer_body("a", parameters={"n": 2}), "n: not supported"),
        ("infer", infer_body("a", parameters={"stream": True}), "stream: allowed only in generate_stream"),
        ("infer", infer_body("a", outputs=[{"name": "b"}]), "outputs: found 'b', allowed are"),
        ("infer", infer_body("a", id=1), "id: found 1, allowed is a text"),
        ("infer", {"inputs": [{"name": "text_input"}]}, "inputs[0].datatype: found None"),
        ("infer", {"inputs": [{"name": "a", "datatype": "FP8", "shape": [1]}]}, "inputs[0].datatype: found 'FP8'"),
        ("infer", {"inputs": [{"name": "a", "datatype": "INT8", "shape": "1"}]}, "inputs[0].shape: found '1'"),
        (
            "infer",
            {"inputs": [{"name": "a", "datatype": "INT8", "shape": [1], "data": ["b"]}]},
            "inputs[0].data: not of INT8",
        ),
        ("infer", {"inputs": [{"name": "a", "datatype": "INT8", "shape": [1]}]}, "inputs[0].data: found None"),
        ("infer", infer_body("a") | {"parameters": {"seed": 1 << 70}}, "seed: found"),
        ("generate", {}, "text_input: found None, allowed is a text"),
        ("generate", {"text_input": ["a"]}, "text_input: found ['a']"),
        ("generate", {"text_input": "\ud800"}, "text_input: found half a surrogate pair"),
        ("generate", {"text_input": "a", "\ud800": 1}, "body: found half a surrogate pair"),
        ("generate", {"text_input": "a", "\ud800": ["x"]}, "body: found half a surrogate pair"),
        ("infer", {"\ud800": 1}, "?: not supported"),
        ("generate", {"text_input": "a", "max_tokens": 1, "parameters": {"max_tokens": 2}}, "max_tokens: given twice"),
        ("generate", {"text_input": "a", "temperature": [0.5]}, "temperature: found 0.5, allowed is a text"),
        ("generate", {"text_input": "a", "temperature": 9}, "temperature: "),
        ("generate_stream", {"text_input": "a", "best": 1}, "best: not supported"),
    ],
)
def test_what_is_wrong_is_named_in_the_protocol_s_form(path: str, body: Any, words: str, client: TestClient) -> None:
    answer = client.post(f"{ECHO}/{path}", content=json.dumps(body))
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_a_body_may_repeat_the_model_of_the_path_and_have_nulls(client: TestClient) -> None:
    """As KServe's SDK sends it."""
    for what, body in (("infer", infer_body("to be")), ("generate", {"text_input": "to be"})):
        same = {"model_name": "echo", "model_version": "1", "id": None, "parameters": None}
        answer = client.post(f"{ECHO}/{what}", json=body | same)
        assert answer.status_code == 200, answer.text
        for field, wrong in (("model_name", "other"), ("model_version", "2"), ("model_name", 5)):
            answer = client.post(f"{ECHO}/versions/1/{what}", json=body | {field: wrong})
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"{field}: found {wrong!r}")


def test_all_but_health_and_readiness_want_a_key(tmp_path: Path, model: EchoModel) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: alice, sha256: {hashlib.sha256(b'secret').hexdigest()}}}\n")
    access = Access(AuthConfig(api_keys_file=file))
    operations = Operations(Router({"echo": model}, LimitsConfig()), Calls(access, LoggingConfig()))
    client = TestClient(http_api(operations), raise_server_exceptions=False)
    for path in ("/v2/health/live", "/v2/health/ready", f"{ECHO}/ready"):
        assert client.get(path).status_code == 200
    wanted = ("/v2", ECHO, f"{ECHO}/config", f"{ECHO}/stats", "/v2/models/stats")
    refused = [client.get(path) for path in wanted] + [client.post("/v2/repository/index")]
    refused += [client.post(f"{ECHO}/{what}", json={"text_input": "a"}) for what in ("generate", "generate_stream")]
    refused.append(client.post(f"{ECHO}/infer", json=infer_body("a")))
    for answer in refused:
        assert answer.status_code == 401
        assert isinstance(answer.json()["error"], str)
    assert not model.requests
    headers = {"Authorization": "Bearer secret"}
    assert client.post(f"{ECHO}/generate", json={"text_input": "a"}, headers=headers).status_code == 200


def binary_body(inputs: list[dict[str, Any]], data: bytes, length: str | None = None) -> dict[str, Any]:
    """As Triton's clients send it."""
    text = json.dumps({"inputs": inputs}).encode()
    return {"content": text + data, "headers": {"Inference-Header-Content-Length": length or str(len(text))}}


def binary_input(name: str, size: Any, **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}, **fields}


def test_inputs_may_be_binary(client: TestClient, model: EchoModel) -> None:
    stop = {**binary_input("max_tokens", 4), "datatype": "INT32"}
    texts = {**binary_input("text_input", 14), "shape": [2]}
    data = b"\x05\0\0\0to be\x01\0\0\0x" + b"\x07\0\0\0"
    answer = client.post(
        f"{ECHO}/infer", **binary_body([{**texts, "parameters": {"binary_data_size": 14}}, stop], data)
    )
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert outputs["text_output"] == ["to be ", "x "]
    assert [request.max_tokens for request in model.requests] == [7, 7]


@pytest.mark.parametrize(
    ("inputs", "data", "length", "words"),
    [
        ([binary_input("text_input", 5)], b"\x01\0\0\0x", "9" * 30, "Inference-Header-Content-Length: found"),
        ([binary_input("text_input", 5)], b"\x01\0\0\0x", "-1", "Inference-Header-Content-Length: found"),
        ([binary_input("text_input", 6)], b"\x01\0\0\0x", None, "inputs[0].parameters.binary_data_size: found 6"),
        ([binary_input("text_input", "5")], b"\x01\0\0\0x", None, "inputs[0].parameters.binary_data_size: found '5'"),
        ([binary_input("text_input", 5, data=["x"])], b"\x01\0\0\0x", None, "no data beside it"),
        ([binary_input("text_input", 4)], b"\0\0\0\0x", None, "body: found 1 bytes behind"),
        ([binary_input("text_input", 5)], b"\x02\0\0\0x", None, "text_input: raw_input_contents: ends within"),
        (
            [binary_input("text_input", 5), {"name": "seed", "datatype": "INT32", "shape": [1], "data": [1]}],
            b"\x01\0\0\0x",
            None,
            "raw_input_contents: found 1 for 2 inputs",
        ),
    ],
)
def test_binary_inputs_that_do_not_fit(
    client: TestClient, inputs: list[dict[str, Any]], data: bytes, length: str | None, words: str
) -> None:
    answer = client.post(f"{ECHO}/infer", **binary_body(inputs, data, length))
    assert answer.status_code == 400
    assert words in answer.json()["error"]
