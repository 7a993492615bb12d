"""The gRPC API of a running cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.families import FAMILIES, FAMILY_NAMES
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.integration.api.reflected import ReflectedService
from tests.integration.counters import Ask, counters_of, until
from tests.integration.processes import Served

TIMEOUT_S = 60
PROMPT = "Q: What is CPU? A:"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is CPU?"}]
SAMPLED = {"max_tokens": 24, "temperature": 1.5, "seed": 11}
# So many sequences, which engine bigdl makes one after the other, take seconds on any machine.
LONG = {"model": "llama", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "n": 16}


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return InferenceStub(channel)


@pytest.fixture(scope="module")
def counters(served: Served) -> Iterator[Ask]:
    with counters_of(served) as ask:
        yield ask


def http(served: Served, path: str, **body: Any) -> Any:
    response = httpx.post(f"{served.http}{path}", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(stub: Any, request: pb.GenerateRequest) -> list[pb.Choice]:
    """The choices whose pieces a stream brings, once it has been seen to end as it must."""
    choices: dict[int, pb.Choice] = {}
    messages = list(stub.GenerateStream(request, timeout=TIMEOUT_S))
    for message in messages:
        piece = message.choice
        whole = choices.setdefault(piece.index, pb.Choice(index=piece.index))
        assert not whole.HasField("finish_reason")
        whole.text += piece.text
        whole.token_ids.extend(piece.token_ids)
        whole.logprobs.extend(piece.logprobs)
        if piece.HasField("finish_reason"):
            whole.finish_reason = piece.finish_reason
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_grpc_streamed_or_not_equals_http_for_a_seed(served: Served, stub: Any, family: str) -> None:
    fields = {"prompt": FAMILIES[family].demo_prompt, "max_tokens": 40, "temperature": 1.5, "seed": 11}
    request = pb.GenerateRequest(model=family, **fields)
    answer = stub.Generate(request, timeout=TIMEOUT_S)
    (whole,), (pieces,) = answer.choices, streamed(stub, request)
    body = http(served, "/v1/completions", model=family, **fields)
    assert pieces.text == whole.text == body["choices"][0]["text"]
    assert pieces.token_ids == whole.token_ids
    assert pieces.finish_reason == whole.finish_reason == body["choices"][0]["finish_reason"]
    assert len(whole.token_ids) == answer.usage.completion_tokens == body["usage"]["completion_tokens"]
    assert answer.usage.total_tokens == body["usage"]["total_tokens"]


def test_choices_echo_and_logprobs_equal_http(served: Served, stub: Any) -> None:
    fields = {"model": "llama", "prompt": PROMPT, "n": 2, "echo": True, "logprobs": 2, **SAMPLED}
    request = pb.GenerateRequest(**fields)
    whole = stub.Generate(request, timeout=TIMEOUT_S).choices
    expected = http(served, "/v1/completions", **fields)["choices"]
    assert len({choice.text for choice in whole}) == 2
    for choices in (whole, streamed(stub, request)):
        for choice, other in zip(choices, expected, strict=True):
            assert (choice.index, choice.text) == (other["index"], other["text"])
            assert choice.text.startswith(PROMPT)
            logprobs = other["logprobs"]
            assert [token.text_offset for token in choice.logprobs] == logprobs["text_offset"]
            assert not choice.logprobs[0].HasField("logprob")
            found = [token.logprob for token in choice.logprobs[1:]]
            assert found == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-3)
            assert [len(token.top) for token in choice.logprobs[1:]] == [2] * len(found)


def test_token_ids_and_several_prompts_equal_http(served: Served, stub: Any) -> None:
    ids = stub.Tokenize(pb.TokenizeRequest(model="llama", prompt=PROMPT), timeout=TIMEOUT_S).tokens
    tokens = pb.TokenIds(ids=ids)
    text = stub.Generate(pb.GenerateRequest(model="llama", prompt=PROMPT, **SAMPLED), timeout=TIMEOUT_S).choices[0].text
    inputs: list[tuple[dict[str, Any], Any]] = [
        ({"prompt_tokens": tokens}, list(ids)),
        ({"prompts": pb.Prompts(prompts=[pb.Prompt(text=PROMPT), pb.Prompt(text="CPU")])}, [PROMPT, "CPU"]),
        ({"prompts": pb.Prompts(prompts=[pb.Prompt(tokens=tokens)] * 2)}, [list(ids)] * 2),
    ]
    for fields, prompt in inputs:
        request = pb.GenerateRequest(model="llama", **fields, **SAMPLED)
        expected = [
            c["text"] for c in http(served, "/v1/completions", model="llama", prompt=prompt, **SAMPLED)["choices"]
        ]
        assert expected[0] == text
        assert [choice.text for choice in stub.Generate(request, timeout=TIMEOUT_S).choices] == expected
        assert [choice.text for choice in streamed(stub, request)] == expected


def test_a_chat_equals_http(served: Served, stub: Any) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in CHAT])
    request = pb.GenerateRequest(model="llama", chat=chat, **SAMPLED)
    body = http(served, "/v1/chat/completions", model="llama", messages=CHAT, **SAMPLED)
    expected = body["choices"][0]["message"]["content"]
    assert stub.Generate(request, timeout=TIMEOUT_S).choices[0].text == expected
    assert streamed(stub, request)[0].text == expected


def test_tokens_and_vectors_equal_http(served: Served, stub: Any) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in CHAT])
    for fields, body in (
        ({"prompt": PROMPT}, {"prompt": PROMPT}),
        ({"prompt": PROMPT, "add_special_tokens": False}, {"prompt": PROMPT, "add_special_tokens": False}),
        ({"chat": chat}, {"messages": CHAT}),
    ):
        answer = stub.Tokenize(pb.TokenizeRequest(model="llama", **fields), timeout=TIMEOUT_S)
        expected = http(served, "/v1/tokenize", model="llama", **body)
        assert (list(answer.tokens), answer.max_model_len) == (expected["tokens"], expected["max_model_len"])
    ids = stub.Tokenize(pb.TokenizeRequest(model="llama", prompt=PROMPT), timeout=TIMEOUT_S).tokens
    text = stub.Detokenize(pb.DetokenizeRequest(model="llama", tokens=ids), timeout=TIMEOUT_S).prompt
    assert PROMPT in text
    assert text == http(served, "/v1/detokenize", model="llama", tokens=list(ids))["prompt"]
    inputs = [pb.Prompt(text=PROMPT), pb.Prompt(text="CPU")]
    vectors = stub.Embed(pb.EmbedRequest(model="llama", inputs=inputs), timeout=TIMEOUT_S)
    body = http(served, "/v1/embeddings", model="llama", input=[PROMPT, "CPU"])
    assert vectors.prompt_tokens == body["usage"]["prompt_tokens"]
    for vector, other in zip(vectors.embeddings, body["data"], strict=True):
        np.testing.assert_allclose(vector.values, other["embedding"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.GenerateRequest(model="gpt-5", prompt="a"), grpc.StatusCode.NOT_FOUND, "served are"),
        (pb.GenerateRequest(model="llama", prompt="a", temperature=3), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (pb.GenerateRequest(model="llama", prompt="CPU " * 2000), grpc.StatusCode.INVALID_ARGUMENT, "512"),
        (pb.GenerateRequest(model="llama"), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ],
)
def test_errors_have_canonical_codes_and_no_stack(
    stub: Any, request_: pb.GenerateRequest, code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as whole:
        stub.Generate(request_, timeout=TIMEOUT_S, metadata=[("x-request-id", "mine")])
    with pytest.raises(grpc.RpcError) as stream:
        list(stub.GenerateStream(request_, timeout=TIMEOUT_S))
    for error in (whole.value, stream.value):
        assert error.code() == code
        assert words in error.details()
        assert "Traceback" not in error.details()
    assert dict(whole.value.trailing_metadata())["x-request-id"] == "mine"


def test_the_request_id_comes_back(stub: Any) -> None:
    request = pb.GenerateRequest(model="llama", prompt=PROMPT, max_tokens=1)
    answer, call = stub.Generate.with_call(request, timeout=TIMEOUT_S, metadata=[("x-request-id", "mine")])
    assert (answer.id, dict(call.trailing_metadata())["x-request-id"]) == ("mine", "mine")
    messages = stub.GenerateStream(request, timeout=TIMEOUT_S)
    (id,) = {message.id for message in messages}
    assert dict(messages.trailing_metadata())["x-request-id"] == id


def test_a_full_queue_says_when_to_come_again(stub: Any) -> None:
    request = pb.GenerateRequest(model="narrow", prompt=PROMPT, max_tokens=400, ignore_eos=True)
    calls = [stub.Generate.future(request, timeout=TIMEOUT_S) for _ in range(12)]
    codes = [call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    refused = calls[codes.index(grpc.StatusCode.RESOURCE_EXHAUSTED)]
    assert int(dict(refused.trailing_metadata())["retry-after"]) >= 1


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("way", ["deadline", "cancel"])
def test_a_client_that_waits_no_longer_stops_the_engine(stub: Any, counters: Ask, method: str, way: str) -> None:
    request = pb.GenerateRequest(**LONG)
    call = getattr(stub, method).future if method == "Generate" else getattr(stub, method)
    code = {"deadline": grpc.StatusCode.DEADLINE_EXCEEDED, "cancel": grpc.StatusCode.CANCELLED}[way]
    for deadline in (1, 5, 20):  # a busy machine may not have begun within the first
        before = counters("llama")
        answer = call(request, timeout=deadline if way == "deadline" else TIMEOUT_S)
        if way == "cancel":
            began = before["generated_tokens"]
            until(counters, "llama", lambda now, began=began: now["generated_tokens"] > began)
            answer.cancel()
        assert answer.code() == code
        if counters("llama")["requests"] > before["requests"]:
            break
    after = until(counters, "llama", lambda now: now["cancelled"] > before["cancelled"])
    assert after["generated_tokens"] - before["generated_tokens"] < LONG["n"] * LONG["max_tokens"]
    # What was given up does not run on: its other sequences, where they were begun at all, end soon.
    short = pb.GenerateRequest(model="llama", prompt=PROMPT, max_tokens=1)
    first = stub.Generate(short, timeout=TIMEOUT_S)
    settled = counters("llama")
    run_on = settled["generated_tokens"] - after["generated_tokens"] - first.usage.completion_tokens
    assert 0 <= run_on < LONG["max_tokens"]
    assert settled["cancelled"] <= before["cancelled"] + LONG["n"]
    # And between two requests that follow, the engine makes the second's tokens alone.
    last = stub.Generate(short, timeout=TIMEOUT_S)
    now = counters("llama")
    assert now["generated_tokens"] == settled["generated_tokens"] + last.usage.completion_tokens
    assert now["cancelled"] == settled["cancelled"]


def test_list_models(stub: Any) -> None:
    models = stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models
    assert [model.id for model in models] == [*FAMILY_NAMES, "narrow"]
    assert all(model.ready for model in models)


def test_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "nibble.v1.Inference", "inference.GRPCInferenceService", "bloom"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT_S)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_a_client_that_knows_reflection_alone(channel: grpc.Channel, stub: Any) -> None:
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"nibble.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services
    service = ReflectedService(channel, "nibble.v1.Inference")
    own = pb.DESCRIPTOR.services_by_name["Inference"]
    assert service.descriptor.methods_by_name.keys() == own.methods_by_name.keys()
    request = {"model": "llama", "prompt": PROMPT, **SAMPLED}
    expected = stub.Generate(pb.GenerateRequest(**request), timeout=TIMEOUT_S).choices[0].text
    (whole,) = service.call("Generate", request)
    assert whole["choices"][0]["text"] == expected
    messages = service.call("GenerateStream", request)
    assert "".join(message["choice"].get("text", "") for message in messages) == expected
    assert messages[-1]["usage"] == whole["usage"]
