"""The HTTP API of a running cluster: real Ray, real engines."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cluster.families import FAMILIES, FAMILY_NAMES
from tests.integration.processes import Served

TIMEOUT_S = 60


def complete(served: Served, model: str, prompt: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, **fields}
    return httpx.post(f"{served.http}/v1/completions", json=body, timeout=TIMEOUT_S)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def streamed(served: Served, model: str, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": model, "prompt": prompt, "stream": True, **fields}
    with httpx.stream("POST", f"{served.http}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("family", ["llama", "gptneox", "bloom"])
def test_the_demos_say_what_a_cpu_is(served: Served, family: str) -> None:
    response = complete(served, family, "Q: What is CPU? A:", max_tokens=64, temperature=0)
    answer = text_of(response)
    assert "CPU" in answer
    assert "processor" in answer or "instructions" in answer
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_starcoder_completes_with_valid_python(served: Served) -> None:
    prompt = "def print_hello_world():"
    code = prompt + text_of(complete(served, "starcoder", prompt, max_tokens=48, temperature=0))
    compile(code, "completion", "exec")
    assert "print" in code.removeprefix(prompt)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_streamed_text_equals_unstreamed_for_a_seed(served: Served, family: str) -> None:
    prompt = FAMILIES[family].demo_prompt
    fields = {"max_tokens": 60, "temperature": 1.5, "seed": 7}
    whole = complete(served, family, prompt, **fields)
    *events, last = streamed(served, family, prompt, stream_options={"include_usage": True}, **fields)
    assert "".join(event["choices"][0]["text"] for event in events) == text_of(whole)
    assert events[-1]["choices"][0]["finish_reason"] == whole.json()["choices"][0]["finish_reason"]
    usage = whole.json()["usage"]
    assert {key: last["usage"][key] for key in usage if key.endswith("_tokens")} == {
        key: usage[key] for key in usage if key.endswith("_tokens")
    }
    # The second request finds the prompt in the KV cache, but for its last block.
    cached = last["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= cached < usage["prompt_tokens"]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sampling_reaches_every_family(served: Served, family: str) -> None:
    prompt = FAMILIES[family].demo_prompt
    texts = {text_of(complete(served, family, prompt, max_tokens=30, temperature=2, seed=seed)) for seed in range(6)}
    assert len(texts) > 1
    top_one = text_of(complete(served, family, prompt, max_tokens=30, temperature=2, top_k=1, seed=1))
    assert top_one == text_of(complete(served, family, prompt, max_tokens=30, temperature=0))


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    whole = text_of(complete(served, "llama", "Q: What is CPU? A:", max_tokens=64, temperature=0))
    word = whole.split()[3]
    response = complete(served, "llama", "Q: What is CPU? A:", max_tokens=64, temperature=0, stop=[word])
    assert text_of(response) == whole.partition(word)[0]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_max_tokens_ends_with_length(served: Served) -> None:
    response = complete(served, "llama", "Q: What is CPU? A:", max_tokens=3, temperature=0)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_prompt_longer_than_the_context_is_refused_and_nothing_else_changes(served: Served, family: str) -> None:
    prompt = FAMILIES[family].demo_prompt
    before = text_of(complete(served, family, prompt, max_tokens=20, temperature=0))
    for stream in (False, True):
        response = complete(served, family, "CPU " * 2000, max_tokens=1, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        assert "512" in response.json()["error"]["message"]
    assert text_of(complete(served, family, prompt, max_tokens=20, temperature=0)) == before


def test_requests_at_once_all_get_their_own_answer(served: Served) -> None:
    prompts = [f"Q: What is {word}? A:" for word in ("CPU", "RAM", "GPU", "Ray")]
    alone = [text_of(complete(served, "bloom", prompt, max_tokens=16, temperature=0)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(
                lambda prompt: text_of(complete(served, "bloom", prompt, max_tokens=16, temperature=0)), prompts * 4
            )
        )
    assert together == alone * 4


def test_a_full_queue_is_429_with_retry_after(served: Served) -> None:
    def ask(_: int) -> httpx.Response:
        return complete(served, "narrow", "Q: What is CPU? A:", max_tokens=400, ignore_eos=True)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(12)))
    codes = {response.status_code for response in responses}
    assert codes == {200, 429}
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_bad_input_is_refused_by_the_running_cluster(served: Served) -> None:
    for fields, param in (({"max_tokens": -1}, "max_tokens"), ({"temperature": -1}, "temperature"), ({"x": 1}, "x")):
        response = complete(served, "llama", "a", **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert complete(served, "gpt-5", "a").status_code == 404
    body = httpx.post(f"{served.http}/v1/completions", content="{", timeout=60)
    assert (body.status_code, body.json()["error"]["type"]) == (400, "invalid_request_error")


def test_models_health_and_readiness(served: Served) -> None:
    cards = httpx.get(f"{served.http}/v1/models", timeout=60).json()["data"]
    assert [card["id"] for card in cards] == [*FAMILY_NAMES, "narrow"]
    assert all(card["ready"] and card["quantization"] == "q4_0" for card in cards)
    assert httpx.get(f"{served.http}/healthz", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{served.http}/readyz", timeout=60).status_code == 200
