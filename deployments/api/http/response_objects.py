"""The objects of OpenAI's Responses API: their types, which the OpenAPI document shows too, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from deployments.api.calls import Call
from deployments.api.http.openai_objects import ContentLogprob, chat_logprobs
from deployments.api.requests.responses import ResponsesRequest
from deployments.error_statuses import public_message, status_of
from deployments.records import LoggedToken

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ContentLogprob]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(TypedDict):
    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(TypedDict):
    """`cache_write_tokens`: 0, since a prompt that is kept costs nothing beside its computation."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(TypedDict):
    """What was asked for stands in it again. `usage` and `completed_at` are null until it is complete."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


def response_object(
    id: str,
    created: int,
    asked: ResponsesRequest,
    output: Sequence[OutputItem] = (),
    status: ResponseStatus = "in_progress",
    usage: ResponseUsage | None = None,
    completed: int | None = None,
    error: ResponseError | None = None,
) -> ResponseObject:
    choice = asked.tool_choice
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "completed_at": completed,
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata,
        "model": asked.model,
        "output": list(output),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort, "summary": None},
        "temperature": asked.temperature,
        "text": {"format": asked_format(asked), "verbosity": "medium"},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in asked.tools],
        "top_logprobs": asked.top_logprobs,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": usage,
        "user": asked.user,
    }


def asked_format(asked: ResponsesRequest) -> dict[str, Any]:
    wanted = asked.text.format
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return wanted.model_dump(by_alias=True)


def response_usage(call: Call) -> ResponseUsage:
    return {
        "input_tokens": call.prompt_tokens,
        "input_tokens_details": {"cached_tokens": call.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": call.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.prompt_tokens + call.completion_tokens,
    }


def response_error(error: Exception) -> ResponseError:
    """OpenAI has few codes for a response that failed; the message says more."""
    codes: Mapping[int, Literal["invalid_prompt", "rate_limit_exceeded"]] = {
        400: "invalid_prompt",
        429: "rate_limit_exceeded",
    }
    return {"code": codes.get(status_of(error).http, "server_error"), "message": public_message(error)}


def output_logprobs(tokens: Sequence[LoggedToken]) -> list[ContentLogprob]:
    return chat_logprobs(tokens)["content"]


def event_logprobs(logprobs: Sequence[ContentLogprob]) -> list[dict[str, Any]]:
    """In events of text they are without bytes."""
    return [
        {
            "token": each["token"],
            "logprob": each["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in each["top_logprobs"]],
        }
        for each in logprobs
    ]
