"""Server-sent events: a request's chunks as OpenAI's clients read them, ended by `data: [DONE]`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from deployments.api.http_calls import HttpCall
from deployments.api.openai_objects import (
    chat_choice,
    chat_chunk,
    chat_logprobs,
    completion_choice,
    completion_chunk,
    completion_logprobs,
    usage_object,
)
from deployments.api.schema import ChatRequest, CompletionRequest, GeneratingBody
from deployments.records import GenerationChunk
from deployments.routing.router import ChoiceChunk
from deployments.status import openai_error

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

# Of the choice at an index a chunk's objects, most often one.
Choices = Callable[[int, GenerationChunk], list[dict[str, Any]]]


async def stream_events(
    items: AsyncGenerator[ChoiceChunk | None, None],
    event: Callable[[list[dict[str, Any]]], dict[str, Any]],
    choices: Choices,
    request: GeneratingBody,
    call: HttpCall,
) -> AsyncGenerator[str, None]:
    """One event a chunk, a comment for every None; an error after the start is an event of its own."""
    try:
        async with aclosing(items):
            async for item in items:
                if item is None:
                    yield KEEP_ALIVE
                    continue
                for choice in choices(item.sequence, item.chunk):
                    body = event([choice])
                    if request.include_usage:
                        body["usage"] = None
                    yield sse(body)
        if request.include_usage:
            usage = usage_object(call.record.prompt_tokens, call.record.completion_tokens)
            yield sse(event([]) | {"usage": usage})
    except Exception as error:  # noqa: BLE001 - the status line is gone: the client must hear of it in the stream
        call.failed(error)
        yield sse(openai_error(error))
    yield DONE


def completion_events(
    request: CompletionRequest, id: str, created: int
) -> tuple[Callable[[list[dict[str, Any]]], dict[str, Any]], Choices]:
    def event(choices: list[Any]) -> Any:
        return completion_chunk(id, created, request.model, choices)

    def choices(index: int, chunk: GenerationChunk) -> list[Any]:
        logprobs = completion_logprobs(chunk.logprobs) if request.logprobs is not None else None
        return [completion_choice(index, chunk.text, chunk.finish_reason, logprobs)]

    return event, choices


def chat_events(
    request: ChatRequest, id: str, created: int
) -> tuple[Callable[[list[dict[str, Any]]], dict[str, Any]], Choices]:
    begun: set[int] = set()

    def event(choices: list[Any]) -> Any:
        return chat_chunk(id, created, request.model, choices)

    def choices(index: int, chunk: GenerationChunk) -> list[Any]:
        objects = []
        if index not in begun:
            begun.add(index)
            objects.append(chat_choice(index, {"role": "assistant", "content": ""}, None, None))
        logprobs = chat_logprobs(chunk.logprobs) if request.logprobs else None
        if chunk.text or chunk.logprobs:
            objects.append(chat_choice(index, {"content": chunk.text}, None, logprobs))
        if chunk.finish_reason is not None:
            objects.append(chat_choice(index, {}, chunk.finish_reason, None))
        return objects

    return event, choices


def sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
