"""OpenAI's Responses API over HTTP. Every answer and event is one of the openai package's own types, and has nothing
that they do not know."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from starlette.testclient import TestClient

from cluster.errors import InvalidRequestError, QueueFullError
from deployments.records import Conversation, GenerationChunk, Message, MessagePiece, ToolCall, ToolCallPiece
from tests.unit.deployments.api.http.test_http_tools import calling
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import client_of

__all__ = ["calling"]

BODY = {"model": "echo", "input": "to be or not"}
STREAM = BODY | {"stream": True}
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}},
    {"type": "function", "name": "now"},
]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def unknown(value: Any) -> list[str]:
    """The names of fields that the openai package's types do not have."""
    if isinstance(value, BaseModel):
        inside = [name for field in type(value).model_fields for name in unknown(getattr(value, field))]
        return [*(value.model_extra or {}), *inside]
    return [name for each in value for name in unknown(each)] if isinstance(value, list) else []


def response_of(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    response = Response.model_validate_json(answer.text, strict=True)
    assert unknown(response) == []
    return answer.json()


def events(text: str) -> list[Any]:
    found = []
    for number, block in enumerate(block for block in text.strip().split("\n\n") if not block.startswith(": ")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert unknown(EVENT.validate_json(data.removeprefix("data: "), strict=True)) == []
        found.append(event)
    return found


def kinds(found: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


def without_times(response: Any) -> Any:
    ids = [{**item, "id": None} for item in response["output"]]
    return {**response, "id": None, "created_at": None, "completed_at": None, "output": ids}


def test_a_response_is_openai_s_object(client: TestClient, model: EchoModel) -> None:
    model.cached_tokens = 3
    asked = {
        "instructions": "Be kind.",
        "metadata": {"a": "b"},
        "max_output_tokens": 9,
        "temperature": 0.5,
        "user": "u",
    }
    response = response_of(client.post("/v1/responses", json=BODY | asked | {"store": False, "truncation": "disabled"}))
    assert asked.items() <= response.items()
    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "echo")
    assert response["completed_at"] >= response["created_at"]
    assert response["usage"] == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    (message,) = response["output"]
    assert message | {"id": None} == {
        "type": "message",
        "id": None,
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "to be or not ", "annotations": [], "logprobs": []}],
    }


def test_text_is_streamed_in_openai_s_order(client: TestClient) -> None:
    found = events(client.post("/v1/responses", json=STREAM).text)
    assert kinds(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, added, last = found[0]["response"], found[2]["item"], found[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (added["status"], added["content"]) == ("in_progress", [])
    assert found[3]["part"]["text"] == ""
    assert [event["delta"] for event in found[4:8]] == ["to ", "be ", "or ", "not "]
    assert found[8]["text"] == found[9]["part"]["text"] == "to be or not "
    assert found[10]["item"] == last["output"][0]
    assert {event["item_id"] for event in found if "item_id" in event} == {added["id"]}
    assert without_times(last) == without_times(response_of(client.post("/v1/responses", json=BODY)))
    assert created["id"] == last["id"]


def test_log_probabilities_where_they_are_included(client: TestClient) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    part = response_of(client.post("/v1/responses", json=BODY | asked))["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["to ", "be ", "or ", "not "]
    top = {"token": "zero", "logprob": -1.0, "bytes": list(b"zero")}
    assert part["logprobs"][0] == {"token": "to ", "logprob": -0.5, "bytes": list(b"to "), "top_logprobs": [top]}
    found = events(client.post("/v1/responses", json=STREAM | asked).text)
    top.pop("bytes")
    assert found[4]["logprobs"] == [{"token": "to ", "logprob": -0.5, "top_logprobs": [top]}]
    assert found[-1]["response"]["output"][0]["content"] == [part]


def test_calls_are_items_of_their_own(client: TestClient, calling: EchoModel) -> None:
    response = response_of(client.post("/v1/responses", json=BODY | {"tools": TOOLS}))
    assert response["status"] == "completed"
    assert [tool["name"] for tool in response["tools"]] == ["get_weather", "now"]
    message, weather, now = response["output"]
    assert message["content"][0]["text"] == "Well."
    assert weather | {"id": None} == {
        "type": "function_call",
        "id": None,
        "status": "completed",
        "call_id": "a1b2c3d4e",
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
    }
    assert (now["call_id"], now["name"], now["arguments"]) == ("f1f2f3f4f", "now", "{}")
    assert len({message["id"], weather["id"], now["id"]}) == 3


def test_calls_are_streamed_one_behind_the_other(client: TestClient, calling: EchoModel) -> None:
    found = events(client.post("/v1/responses", json=STREAM | {"tools": TOOLS}).text)
    assert kinds(found)[4:] == [
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added = [event["item"] for event in found if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert [(item["type"], item["status"]) for item in added[1:]] == [("function_call", "in_progress")] * 2
    assert [item["arguments"] for item in added[1:]] == ["", ""]
    assert found[11]["arguments"] == '{"city": "Paris"}'
    assert found[11]["item_id"] == added[1]["id"]
    assert [event["output_index"] for event in found if "output_index" in event] == [0] * 6 + [1] * 5 + [2] * 4
    assert done == found[-1]["response"]["output"]
    whole = response_of(client.post("/v1/responses", json=BODY | {"tools": TOOLS}))
    assert without_times(found[-1]["response"]) == without_times(whole)


def test_the_output_is_taken_back_as_input(client: TestClient, calling: EchoModel) -> None:
    """The loop of an agent."""
    first = response_of(client.post("/v1/responses", json=BODY | {"tools": TOOLS}))
    answers = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "hot"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    items = [{"role": "user", "content": "hi"}, *first["output"], *answers]
    response_of(client.post("/v1/responses", json=BODY | {"tools": TOOLS, "input": items}))
    conversation = calling.requests[1].prompt
    assert isinstance(conversation, Conversation)
    calls = (ToolCall("a1b2c3d4e", "get_weather", '{"city": "Paris"}'), ToolCall("f1f2f3f4f", "now", "{}"))
    assert conversation.messages[1:] == (
        Message("assistant", "Well.", tool_calls=calls),
        Message("tool", "hot", name="get_weather", tool_call_id="a1b2c3d4e"),
        Message("tool", "hot", name="now", tool_call_id="f1f2f3f4f"),
    )


@pytest.mark.parametrize(
    ("pieces", "items"),
    [
        ([MessagePiece("", ())], [("message", "")]),
        ([MessagePiece("", (ToolCallPiece(0, "", "c1", "now"),))], [("function_call", "")]),
        (
            [MessagePiece("", (ToolCallPiece(0, "{", "c1", "now"),)), MessagePiece(" so", ())],
            [("function_call", "{"), ("message", " so")],
        ),
    ],
)
def test_an_output_has_an_item_at_least(
    client: TestClient, model: EchoModel, pieces: list[MessagePiece], items: list[tuple[str, str]]
) -> None:
    ended = [None] * (len(pieces) - 1) + ["stop"]
    model.answer = [GenerationChunk("raw", (1,), e, 3, 1, message=p) for p, e in zip(pieces, ended, strict=True)]
    whole = response_of(client.post("/v1/responses", json=BODY | {"tools": TOOLS}))
    streamed = events(client.post("/v1/responses", json=STREAM | {"tools": TOOLS}).text)
    for response in (whole, streamed[-1]["response"]):
        found = [
            (i["type"], i["arguments"] if "arguments" in i else i["content"][0]["text"]) for i in response["output"]
        ]
        assert found == items
        assert {item["status"] for item in response["output"]} == {"completed"}


def test_a_response_that_is_cut_is_incomplete(client: TestClient, model: EchoModel) -> None:
    model.answer = [GenerationChunk("to ", (1,), None, 3, 1), GenerationChunk("be", (2,), "length", 3, 2)]
    whole = response_of(client.post("/v1/responses", json=BODY))
    last = events(client.post("/v1/responses", json=STREAM).text)[-1]
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        assert (response["status"], response["completed_at"]) == ("incomplete", None)
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert [item["status"] for item in response["output"]] == ["incomplete"]
        assert response["usage"]["output_tokens"] == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (QueueFullError("gone"), "rate_limit_exceeded", "gone"),
        (InvalidRequestError("response_format: no", "response_format"), "invalid_prompt", "text.format: no"),
        (RuntimeError("secret path /etc"), "server_error", "internal error; the server's log has the details"),
    ],
)
def test_a_stream_that_breaks_ends_in_a_failed_response(
    client: TestClient, model: EchoModel, error: Exception, code: str, message: str
) -> None:
    model.error, model.error_at = error, 2
    found = events(client.post("/v1/responses", json=STREAM).text)
    assert kinds(found)[-2:] == ["output_text.delta", "failed"]
    response = found[-1]["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": code, "message": message})
    assert [(i["status"], i["content"][0]["text"]) for i in response["output"]] == [("incomplete", "to be ")]
    assert model.closed == 1


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_chunk_is_the_answer_s(client: TestClient, model: EchoModel, stream: bool) -> None:
    model.error = InvalidRequestError("response_format: /type: no", "response_format")
    refused = client.post("/v1/responses", json=BODY | {"stream": stream})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "text.format"
    assert refused.json()["error"]["message"] == "text.format: /type: no"
    unknown_model = client.post("/v1/responses", json=BODY | {"model": "x", "stream": stream})
    assert (unknown_model.status_code, unknown_model.json()["error"]["code"]) == (404, "model_not_found")
    assert model.closed == 1


def test_the_operator_s_limit_is_told_in_this_api_s_words(model: EchoModel) -> None:
    refused = client_of(model, max_tokens=10).post("/v1/responses", json=BODY | {"max_output_tokens": 11})
    assert refused.json()["error"]["message"] == "max_output_tokens: found 11, allowed are up to 10"


def test_a_stream_that_waits_is_kept_alive_and_then_fails_in_an_event(model: EchoModel) -> None:
    client = client_of(model, keep_alive_s=0.01)
    model.delay_s, model.error = 0.1, InvalidRequestError("prompt: too long", "prompt")
    late = client.post("/v1/responses", json=STREAM)
    assert ": keep-alive\n\n" in late.text
    found = events(late.text)
    assert kinds(found) == ["created", "in_progress", "failed"]
    assert found[-1]["response"]["error"] == {"code": "invalid_prompt", "message": "input: too long"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/resp_1"),
        ("GET", "/v1/responses/resp_1/input_items"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ],
)
def test_nothing_is_stored(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert "no response is stored; send the whole conversation as `input`" in answer.json()["error"]["message"]


def test_the_document_has_it(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/responses"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ResponsesRequest"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
