"""POST /v1/responses: OpenAI's Responses API. A request becomes a chat completion (`requests/responses.py`); its chunks
become the items of an output, and events as they grow. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import InvalidRequestError
from deployments.api.http.http_bodies import json_body
from deployments.api.http.http_calls import HttpCall, call_of
from deployments.api.http.http_stream import KEEP_ALIVE, begun, event_stream, sse
from deployments.api.http.openapi import answers
from deployments.api.http.response_objects import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponseObject,
    event_logprobs,
    output_logprobs,
    response_error,
    response_object,
    response_usage,
)
from deployments.api.operations import Generation, Operations
from deployments.api.requests.parsing import parse
from deployments.api.requests.responses import ResponsesRequest, in_own_names, own_names
from deployments.records import FinishReason, GenerationChunk, LoggedToken, ToolCallPiece

NOT_STORED = "no response is stored; send the whole conversation as `input` of POST /v1/responses"

Event = dict[str, Any]


def add_response_routes(api: FastAPI, get_operations: Callable[[], Operations]) -> None:
    @api.post("/v1/responses", responses=answers(ResponseObject, streams=True))
    async def responses(request: Request) -> Response:
        """The assistant's next turn, as items: a message, calls of functions. With `stream`, server-sent events."""
        operations, call = get_operations(), call_of(request)
        body = parse(ResponsesRequest, await json_body(request))
        id, created = f"resp_{call.record.request_id}", int(time.time())
        if body.stream:
            with own_names():
                generation = await begun(operations, call, body.chat, id)
            return event_stream(response_events(generation, operations.limits.keep_alive_s, body, call, id, created))
        output = Output(call.record.request_id)
        with own_names():
            async with aclosing(operations.begin(call.record, body.chat, id)) as generation:
                async for _, chunk in generation:
                    for _ in output.add(chunk):
                        pass  # events, which nobody waits for
        return JSONResponse(completed_response(id, created, body, output, call))

    @api.get("/v1/responses/{id:path}", include_in_schema=False)
    @api.delete("/v1/responses/{id:path}", include_in_schema=False)
    @api.post("/v1/responses/{id}/cancel", include_in_schema=False)
    async def stored(id: str) -> None:
        raise HTTPException(404, NOT_STORED)


def completed_response(
    id: str, created: int, asked: ResponsesRequest, output: Output, call: HttpCall
) -> ResponseObject:
    usage = response_usage(call.record)
    if output.finish_reason == "length":
        return response_object(id, created, asked, output.items, "incomplete", usage)
    return response_object(id, created, asked, output.items, "completed", usage, completed=int(time.time()))


async def response_events(
    generation: Generation, keep_alive_s: float, asked: ResponsesRequest, call: HttpCall, id: str, created: int
) -> AsyncGenerator[str, None]:
    """Each has a number, from 0 on. The last one has the whole response; there is no `[DONE]` behind it."""
    output, number = Output(call.record.request_id), 0

    def named(event: Event) -> str:
        nonlocal number
        data = sse({**event, "sequence_number": number})
        number += 1
        return f"event: {event['type']}\n{data}"

    try:
        async with aclosing(generation):
            for kind in ("created", "in_progress"):
                yield named({"type": f"response.{kind}", "response": response_object(id, created, asked)})
            while not await generation.first_came(keep_alive_s):
                yield KEEP_ALIVE
            async for _, chunk in generation:
                for event in output.add(chunk):
                    yield named(event)
        response = completed_response(id, created, asked, output, call)
    except Exception as error:  # noqa: BLE001 - the status line is gone: the client must hear of it in the stream
        call.failed(error)
        told = response_error(in_own_names(error) if isinstance(error, InvalidRequestError) else error)
        response = response_object(id, created, asked, output.broken(), "failed", error=told)
    yield named({"type": f"response.{response['status']}", "response": response})


class Output:
    """The items of a response as they grow: text is a message's, calls are items of their own. Text behind a call
    begins another message."""

    def __init__(self, request_id: str) -> None:
        self.items: list[OutputItem] = []
        self.finish_reason: FinishReason | None = None
        self._request_id = request_id
        self._open = False  # whether the last item still grows

    def add(self, chunk: GenerationChunk) -> Iterator[Event]:
        """Takes a chunk as its events are drawn. The last one completes the items; without any there is one message
        without text."""
        text = chunk.text if chunk.message is None else chunk.message.content
        if text:
            yield from self._say(text, chunk.logprobs)
        for piece in chunk.message.tool_calls if chunk.message is not None else ():
            yield from self._call(piece)
        self.finish_reason = chunk.finish_reason
        if chunk.finish_reason is not None:
            if not self.items:
                yield from self._begin(self._message())
            yield from self._end("incomplete" if chunk.finish_reason == "length" else "completed")

    def broken(self) -> list[OutputItem]:
        """The items of a response that failed."""
        if self._open:
            self.items[-1]["status"] = "incomplete"
        return self.items

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._request_id}-{len(self.items)}"

    def _message(self) -> OutputMessage:
        return {
            "type": "message",
            "id": self._id("msg"),
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }

    def _say(self, text: str, logged: tuple[LoggedToken, ...]) -> Iterator[Event]:
        if not self._open or self.items[-1]["type"] != "message":
            yield from self._end("completed")
            yield from self._begin(self._message())
        message = self.items[-1]
        assert message["type"] == "message", "it has just been begun, if it was not there"
        logprobs = output_logprobs(logged)
        part = message["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._text_event("delta", {"delta": text, "logprobs": event_logprobs(logprobs)})

    def _call(self, piece: ToolCallPiece) -> Iterator[Event]:
        if piece.id is not None and piece.name is not None:
            yield from self._end("completed")
            call: OutputCall = {
                "type": "function_call",
                "id": self._id("fc"),
                "status": "in_progress",
                "call_id": piece.id,
                "name": piece.name,
                "arguments": "",
            }
            yield from self._begin(call)
        if piece.arguments:
            grown = self.items[-1]
            assert grown["type"] == "function_call", "a call's pieces follow each other"
            grown["arguments"] += piece.arguments
            yield {"type": "response.function_call_arguments.delta", **self._place, "delta": piece.arguments}

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        self.items.append(item)
        self._open = True
        yield self._item_event("added")
        if item["type"] == "message":
            part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            yield self._part_event("added", part)

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._text_event("done", {"text": part["text"], "logprobs": event_logprobs(part["logprobs"])})
            yield self._part_event("done", part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **self._place, **told}
        yield self._item_event("done")

    def _text_event(self, kind: str, told: Event) -> Event:
        return {"type": f"response.output_text.{kind}", **self._place, "content_index": 0, **told}

    def _part_event(self, kind: str, part: OutputText) -> Event:
        return {"type": f"response.content_part.{kind}", **self._place, "content_index": 0, "part": part}

    def _item_event(self, kind: str) -> Event:
        output_index = len(self.items) - 1
        return {"type": f"response.output_item.{kind}", "output_index": output_index, "item": self.items[-1]}
