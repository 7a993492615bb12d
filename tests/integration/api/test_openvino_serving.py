"""`engine: openvino` in a configuration changes the engine and nothing else: the same requests, the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from cluster.families import FAMILIES, FAMILY_NAMES
from cluster.ray_cluster import free_ports
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.integration.api.test_http import TIMEOUT_S, complete, streamed, text_of
from tests.integration.processes import Served, replicas, sandbox, serving
from tests.random_checkpoint import OPENVINO_SHAPES, write_lively_weights, write_random_checkpoint

MODELS = "\n".join(
    f"- {{name: {name}, family: {name}, checkpoint: 'builtin:{name}', engine: openvino, threads: 1}}"
    for name in FAMILY_NAMES
)
QUESTIONS = ["Q: What is CPU? A:", "Q: What is RAM? A:", "Q: What is Ray? A:", "Q: What is Python? A:"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    http_port, grpc_port = free_ports(2)
    with sandbox() as home:
        qwen = write_random_checkpoint(home.home / "qwen2", OPENVINO_SHAPES["qwen2"], write=write_lively_weights)
        own = (
            f"- {{name: qwen2, family: llama, checkpoint: {qwen}, engine: openvino, threads: 1, context: 128,"
            " openvino: {tune: precision, prompt_lookup: 4, kv_cache: 4MB}}"
        )
        drafted = (
            "- {name: drafted, family: llama, checkpoint: 'builtin:llama', engine: openvino, threads: 1,"
            " replicas: {min: 1, max: 2}, openvino: {draft: {checkpoint: 'builtin:llama', tokens: 3}}}"
        )
        with serving(home, f"models:\n{MODELS}\n{own}\n{drafted}\n", http_port, grpc_port) as served:
            yield served


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_demos_answer_as_on_the_other_engine(served: Served, family: str) -> None:
    prompt = FAMILIES[family].demo_prompt
    answer = text_of(complete(served, family, prompt, max_tokens=48, temperature=0))
    if family == "starcoder":
        compile(prompt + answer, "completion", "exec")
    else:
        assert "CPU" in answer
        assert "processor" in answer or "instructions" in answer


def test_its_replicas_are_started_with_huge_pages_for_malloc(served: Served) -> None:
    (replica,) = replicas(served.sandbox, "llama")
    assert b"GLIBC_TUNABLES=glibc.malloc.hugetlb=1\0" in Path(f"/proc/{replica}/environ").read_bytes()


def test_with_a_draft_model_the_answer_is_the_same(served: Served) -> None:
    answers = {
        text_of(complete(served, name, QUESTIONS[0], max_tokens=40, temperature=0)) for name in ("llama", "drafted")
    }
    assert len(answers) == 1


def test_many_at_once_get_the_answers_that_each_gets_alone(served: Served) -> None:
    def ask(prompt: str) -> str:
        return text_of(complete(served, "llama", prompt, max_tokens=24, temperature=0))

    alone = [ask(prompt) for prompt in QUESTIONS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, QUESTIONS * 4))
    # Which pieces of prompts share a step depends on when they come, and a near tie may turn with the last bits.
    assert sum(one == other for one, other in zip(together, alone * 4, strict=True)) >= 15


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_streams_and_grpc_give_the_text_of_the_same_seed(served: Served, family: str) -> None:
    prompt, fields = FAMILIES[family].demo_prompt, {"max_tokens": 30, "temperature": 0.5, "seed": 7}
    whole = text_of(complete(served, family, prompt, **fields))
    events = streamed(served, family, prompt, **fields)
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        answer = stub.Generate(pb.GenerateRequest(model=family, prompt=prompt, **fields), timeout=TIMEOUT_S)
    assert answer.choices[0].text == whole


def test_structured_output_log_probabilities_echo_and_choices(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"cpu": {"type": "boolean"}},
        "required": ["cpu"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = complete(served, "llama", "Q: What is CPU? A:", max_tokens=40, response_format=wanted, seed=1)
    assert isinstance(json.loads(text_of(answer))["cpu"], bool)
    echoed = complete(served, "llama", "Q: What is CPU?", max_tokens=4, temperature=0, echo=True, logprobs=2).json()
    choice = echoed["choices"][0]
    assert choice["text"].startswith("Q: What is CPU?")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])
    several = complete(served, "llama", "Q: What is", max_tokens=12, temperature=1.5, n=3, seed=5).json()
    assert len({choice["text"] for choice in several["choices"]}) == 3
    biased = complete(served, "llama", "Q:", max_tokens=3, temperature=0, logit_bias={"300": 100}).json()
    assert len(biased["choices"][0]["text"]) > 0


def test_embeddings_tell_texts_apart(served: Served) -> None:
    body = {"model": "bloom", "input": ["What is CPU?", "What is CPU?", "What is Ray?"]}
    data = httpx.post(f"{served.http}/v1/embeddings", json=body, timeout=TIMEOUT_S).json()["data"]
    one, same, other = (np.array(item["embedding"]) for item in data)
    assert np.allclose(one, same, atol=0.05 * np.abs(one).max())
    assert not np.allclose(one, other, atol=0.1 * np.abs(one).max())


def test_a_checkpoint_that_bigdl_refuses_is_served_and_the_status_names_its_engine(served: Served) -> None:
    first, again = (
        complete(served, "qwen2", "aab aab aab", max_tokens=20, temperature=0, ignore_eos=True) for _ in "12"
    )
    assert text_of(first) == text_of(again)
    assert first.json()["usage"]["completion_tokens"] == 20
    cards = httpx.get(f"{served.http}/v1/models", timeout=TIMEOUT_S).json()["data"]
    assert {card["id"]: card["engine"] for card in cards} == dict.fromkeys(
        [*FAMILY_NAMES, "qwen2", "drafted"], "openvino"
    )
    status = served.sandbox.run("status")
    assert "openvino" in status.stdout, status.stdout + status.stderr


def test_what_is_out_of_range_is_refused_and_the_others_go_on(served: Served) -> None:
    refused = complete(served, "qwen2", "a " * 400, max_tokens=4)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert complete(served, "qwen2", "a", max_tokens=2).status_code == 200
