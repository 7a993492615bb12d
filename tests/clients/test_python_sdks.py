"""Python clients that are installed beside nibble: OpenAI's own package, LangChain and LiteLLM for its API, Triton's
HTTP client for the Open Inference Protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel

from tests.integration.processes import Served

PROMPT = "Q: What is CPU? A:"
MESSAGES = [{"role": "user", "content": "What is CPU?"}]


class Light(BaseModel):
    room: Literal["kitchen", "hall"]
    on: bool


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
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
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


def test_openai_responses_created_streamed_and_parsed(client: openai.OpenAI) -> None:
    options = {"model": "llama", "input": PROMPT, "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**options, instructions="Be brief.", store=False, metadata={"run": "1"})
    assert whole.output_text
    assert whole.metadata == {"run": "1"}
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**options, instructions="Be brief.", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == f"response.{whole.status}"
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens
    asked = {"model": "llama", "input": MESSAGES, "text_format": Light, "extra_body": {"seed": 5}}
    parsed = client.responses.parse(**asked)
    assert parsed.output_parsed.room in ("kitchen", "hall")
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_openai_responses_with_tools_in_a_loop(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Light, name="set_light")["function"]
    options = {"model": "llama", "tools": [{"type": "function", **tool}], "extra_body": {"seed": 5}}
    items = [*MESSAGES]
    called = client.responses.create(input=items, tool_choice={"type": "function", "name": "set_light"}, **options)
    (call,) = called.output
    assert (call.type, call.name, call.status) == ("function_call", "set_light", "completed")
    Light.model_validate_json(call.arguments)
    with client.responses.stream(input=items, tool_choice="required", parallel_tool_calls=False, **options) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    # As the package's own objects, and as plain ones.
    for output in (called.output, [item.model_dump() for item in called.output]):
        answered = [*items, *output, {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
        last = client.responses.create(input=answered, tool_choice="none", max_output_tokens=5, **options)
        assert [item.type for item in last.output] == ["message"]


def test_openai_responses_refuse_what_would_need_a_store(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as refused:
        client.responses.create(model="llama", input="hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="no response is stored"):
        client.responses.retrieve("resp_1")


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


def test_langchain_tools_in_a_loop(served: Served) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{served.http}/v1", api_key="any", model="llama", temperature=0, max_retries=0, seed=5)
    asked = HumanMessage("What is CPU?")
    called = chat.bind_tools([Light], tool_choice="Light", strict=True).invoke([asked])
    (call,) = called.tool_calls
    Light.model_validate(call["args"])
    done = ToolMessage("done", tool_call_id=call["id"])
    told = chat.bind_tools([Light], tool_choice="none").invoke([asked, called, done], max_completion_tokens=5)
    assert told.tool_calls == []
    assert isinstance(chat.with_structured_output(Light).invoke([asked]), Light)


def test_langchain_a_hundred_embeddings(served: Served) -> None:
    """It sends up to a thousand texts at once, as token ids of OpenAI's own tokenizer unless told otherwise."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=f"{served.http}/v1", api_key="any", model="llama", max_retries=0, check_embedding_ctx_length=False
    )
    texts = [f"What is {number}?" for number in range(100)]
    vectors = embeddings.embed_documents(texts)
    assert len(vectors) == 100
    assert vectors[7] == pytest.approx(embeddings.embed_query(texts[7]), abs=1e-4)


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


def test_triton_s_http_client_with_binary_inputs_or_json(served: Served) -> None:
    import tritonclient.http as triton  # here: it loads gevent

    texts = np.array([PROMPT.encode(), b"A"], dtype=object)
    with triton.InferenceServerClient(served.http.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_model_ready("llama")
        assert not client.is_model_ready("gpt-5")
        assert client.get_model_metadata("llama")["inputs"][0]["name"] == "text_input"
        assert client.get_model_config("llama")["input"][0]["data_type"] == "TYPE_STRING"
        assert {"llama", "bloom"} <= {each["name"] for each in client.get_model_repository_index()}
        answers = []
        for binary in (True, False):  # the former is its default
            asked = triton.InferInput("text_input", [2], "BYTES")
            asked.set_data_from_numpy(texts, binary_data=binary)
            found = client.infer("llama", [asked], request_id="mine", parameters={"max_tokens": 30, "temperature": 0.0})
            assert found.get_response()["id"] == "mine"
            answers.append(found.as_numpy("text_output").tolist())
        (statistics,) = client.get_inference_statistics("llama")["model_stats"]
        assert statistics["inference_count"] >= 4
        with pytest.raises(triton.InferenceServerException, match="served are"):
            client.infer("gpt-5", [asked])
    assert answers[0] == answers[1]
    assert "CPU" in answers[0][0]
