"""What others wrote for OpenAI's API on a running cluster: its own Python package, LangChain, LiteLLM. Nothing of this
may reach beyond this machine: every proxy leads to a closed port, loopback alone is exempt."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.integration.processes import Served

PROMPT = "Q: What is CPU? A:"
MESSAGES = [{"role": "user", "content": "What is CPU?"}]
OFFLINE = {
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
        if name.endswith("PROXY"):
            monkeypatch.setenv(name.lower(), value)


@pytest.fixture
def client(served: Served, offline: None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.http}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_completions_streamed_or_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="llama", prompt=PROMPT, max_tokens=30, temperature=0, logprobs=2)
    assert "CPU" in whole.choices[0].text
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.top_logprobs) > 5
    chunks = list(
        client.completions.create(
            model="llama",
            prompt=PROMPT,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_chat_streamed_or_not(client: openai.OpenAI) -> None:
    options = {"model": "llama", "messages": MESSAGES, "max_completion_tokens": 20, "temperature": 1, "seed": 3}
    whole = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].message.role == "assistant"
    first = whole.choices[0].logprobs.content[0]
    assert first.logprob <= 0
    assert len(first.top_logprobs) == 2
    texts = ["", ""]
    for chunk in client.chat.completions.create(**options, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_openai_embeddings_in_its_default_encoding(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="llama", input=["What is CPU?", "A"])
    plain = client.embeddings.create(model="llama", input="What is CPU?", encoding_format="float")
    assert [each.index for each in found.data] == [0, 1]
    assert all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found.data[0].embedding, plain.data[0].embedding, strict=True)
    )


def test_openai_errors_models_and_request_ids(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="llama", prompt="a", temperature=1.5, top_p=3)
    assert wrong.value.param == "top_p"
    assert {"llama", "bloom"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("llama").owned_by == "nibble"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    answer = client.completions.with_raw_response.create(
        model="llama", prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine-7"}
    )
    assert answer.headers["x-request-id"] == "mine-7"
    assert answer.parse().choices[0].finish_reason in ("stop", "length")


def test_langchain_chat_and_completions(served: Served) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    options = {"base_url": f"{served.http}/v1", "api_key": "any", "model": "llama", "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**options, max_completion_tokens=20)
    whole = chat.invoke("What is CPU?")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("What is CPU?")) == whole.content
    # It counts the tokens of a prompt itself unless it is told how many there may be.
    assert "CPU" in OpenAI(**options, max_tokens=30).invoke(PROMPT)


async def test_litellm_completions_blocking_or_not(served: Served) -> None:
    import litellm  # here: it asks its environment on import whether it may fetch anything

    options = {"api_base": f"{served.http}/v1", "api_key": "any", "max_tokens": 20, "temperature": 0, "max_retries": 0}
    whole = litellm.completion(model="openai/llama", messages=MESSAGES, **options)
    text = whole.choices[0].message.content
    assert text
    chunks = await litellm.acompletion(model="openai/llama", messages=MESSAGES, stream=True, **options)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == text
    completion = litellm.text_completion(model="text-completion-openai/llama", prompt=PROMPT, **options)
    assert "CPU" in completion.choices[0].text
