"""Server-sent events: a request's chunks as OpenAI's clients read them, ended by `data: [DONE]`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

from deployments.api.http.http_calls import HttpCall
from deployments.api.http.openai_objects import (
    chat_choice,
    chat_chunk,
    chat_logprobs,
    completion_choice,
    completion_chunk,
    completion_logprobs,
    token_ids,
    tool_call_delta,
    usage_object,
)
from deployments.api.operations import GeneratingRequest, Generation, Operations
from deployments.api.requests.schema import ChatRequest, CompletionRequest, GeneratingBody
from deployments.error_statuses import openai_error
from deployments.records import GenerationChunk

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

# The event around a chunk's choices.
Event = Callable[[list[dict[str, Any]]], dict[str, Any]]
# The choice objects that a chunk of the sequence at an index becomes, most often one.
Choices = Callable[[int, GenerationChunk], list[dict[str, Any]]]
EventForms = tuple[Event, Choices]


async def begun(operations: Operations, call: HttpCall, body: GeneratingRequest, id: str) -> Generation:
    """A generation for a stream. An error before the first chunk chooses the response's status; one that comes after
    longer than `limits.keep_alive_s` no longer can."""
    generation = operations.begin(call.record, body, id)
    try:
        await generation.first_came(operations.limits.keep_alive_s)
    except BaseException:
        await generation.aclose()
        raise
    return generation


def event_stream(events: AsyncGenerator[str, None]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def stream_events(
    generation: Generation,
    keep_alive_s: float,
    event: Event,
    choices: Choices,
    asked: GeneratingBody,
    call: HttpCall,
) -> AsyncGenerator[str, None]:
    """One event a chunk, a comment whenever the first one keeps the client waiting for another `keep_alive_s`; an error
    is an event of its own."""
    try:
        async with aclosing(generation):
            while not await generation.first_came(keep_alive_s):
                yield KEEP_ALIVE
            async for sequence, chunk in generation:
                for choice in choices(sequence, chunk):
                    body = event([choice])
                    # Of a chat they stand beside the choices, which share the prompt.
                    if asked.return_token_ids and chunk.prompt_token_ids and "delta" in choice:
                        body["prompt_token_ids"] = chunk.prompt_token_ids
                    if asked.continuous_usage:
                        body["usage"] = usage_object(chunk.prompt_tokens, chunk.completion_tokens, chunk.cached_tokens)
                    elif asked.include_usage:
                        body["usage"] = None
                    yield sse(body)
        if asked.include_usage:
            record = call.record
            usage = usage_object(record.prompt_tokens, record.completion_tokens, record.cached_tokens)
            yield sse(event([]) | {"usage": usage})
    except Exception as error:  # noqa: BLE001 - the status line is gone: the client must hear of it in the stream
        call.failed(error)
        yield sse(openai_error(error))
    yield DONE


def completion_events(request: CompletionRequest, id: str, created: int) -> EventForms:
    def event(choices: list[Any]) -> Any:
        return completion_chunk(id, created, request.model, choices)

    def choices(index: int, chunk: GenerationChunk) -> list[Any]:
        logprobs = completion_logprobs(chunk.logprobs) if request.logprobs is not None else None
        ids = token_ids(chunk) if request.return_token_ids else {}
        return [{**completion_choice(index, chunk.text, chunk.finish_reason, logprobs), **ids}]

    return event, choices


def chat_events(request: ChatRequest, id: str, created: int) -> EventForms:
    begun: set[int] = set()

    def event(choices: list[Any]) -> Any:
        return chat_chunk(id, created, request.model, choices)

    def choices(index: int, chunk: GenerationChunk) -> list[Any]:
        objects = []
        if index not in begun:
            begun.add(index)
            objects.append(chat_choice(index, {"role": "assistant", "content": ""}, None, None))
        logprobs = chat_logprobs(chunk.logprobs) if request.logprobs else None
        ids = {"token_ids": chunk.token_ids} if request.return_token_ids else {}
        text = chunk.text if chunk.message is None else chunk.message.content
        if text or chunk.logprobs or (ids and chunk.token_ids):
            objects.append({**chat_choice(index, {"content": text}, None, logprobs), **ids})
        for piece in chunk.message.tool_calls if chunk.message is not None else ():
            objects.append(chat_choice(index, {"tool_calls": [tool_call_delta(piece)]}, None, None))
        if chunk.finish_reason is not None:
            objects.append(chat_choice(index, {}, chunk.finish_reason, None))
        return objects

    return event, choices


def sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
