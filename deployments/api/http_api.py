"""The HTTP side of the router: OpenAI's API, tokenization, health. What all requests pass on their way in and out
(request id, key, limits, log) is `deployments/api/http_calls.py`."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.errors import InvalidRequestError, NibbleError
from deployments.api import openai_objects as objects
from deployments.api.calls import Calls
from deployments.api.http_calls import CallMiddleware, HttpCall, error_response
from deployments.api.http_stream import chat_events, completion_events, stream_events
from deployments.api.openapi import answers, describe
from deployments.api.parsing import parse
from deployments.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deployments.routing.router import ChoiceChunk, Router, best, collect, paced


def build_http_api(get_router: Callable[[], Router], get_calls: Callable[[], Calls]) -> FastAPI:
    """The ASGI app; the functions are called for each request, since Serve builds the app before the router exists."""
    about = "INT4 inference of Hugging Face language models on CPUs"
    # Without FastAPI's pages of documentation, which fetch scripts from elsewhere.
    api = FastAPI(title="nibble", description=about, docs_url=None, redoc_url=None)
    api.add_middleware(CallMiddleware, get_router=get_router, get_calls=get_calls)
    started = int(time.time())

    @api.post("/v1/completions", responses=answers(objects.CompletionObject, streams=True))
    async def completions(request: Request) -> Response:
        """Text that continues a prompt. With `stream`, server-sent events ended by `data: [DONE]`."""
        router, call = get_router(), call_of(request)
        body = parse(CompletionRequest, await json_body(request))
        call.record.about(body.model, body.prompt)
        id, created = f"cmpl-{call.record.request_id}", int(time.time())
        requests = body.completions(id, router.limits)
        chunks = call.record.counted(router.generate(body.model, requests), body.sequences)
        if body.stream:
            items = await begun(paced(chunks, router.limits.keep_alive_s))
            return event_stream(stream_events(items, *completion_events(body, id, created), body, call))
        every = await collect(chunks, len(requests))
        whole = best(every, body.n, body.sequences)
        return JSONResponse(
            objects.completion_object(id, created, body.model, whole, used(call), body.logprobs is not None)
        )

    @api.post("/v1/chat/completions", responses=answers(objects.ChatObject, streams=True))
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message, by the model's chat template (a plain one for a model that has none)."""
        router, call = get_router(), call_of(request)
        body = parse(ChatRequest, await json_body(request))
        call.record.about(body.model, [message.model_dump(exclude_unset=True) for message in body.messages])
        id, created = f"chatcmpl-{call.record.request_id}", int(time.time())
        requests = body.completions(id, router.limits)
        chunks = call.record.counted(router.generate(body.model, requests), body.sequences)
        if body.stream:
            items = await begun(paced(chunks, router.limits.keep_alive_s))
            return event_stream(stream_events(items, *chat_events(body, id, created), body, call))
        whole = await collect(chunks, len(requests))
        return JSONResponse(objects.chat_object(id, created, body.model, whole, used(call), body.logprobs))

    @api.post("/v1/embeddings", responses=answers(objects.EmbeddingList))
    async def embeddings(request: Request) -> Response:
        """The model's last hidden state after each input, as the runtime gives it: not normalized."""
        router, call = get_router(), call_of(request)
        body = parse(EmbeddingRequest, await json_body(request))
        call.record.about(body.model, body.input)
        inputs = body.inputs()
        if len(inputs) > router.limits.choices:
            raise InvalidRequestError(f"input: found {len(inputs)}, allowed are up to {router.limits.choices}", "input")
        model = router.model(body.model)
        data: list[objects.Embedding] = []
        tokens = 0
        for index, each in enumerate(inputs):
            vector, count = await model.embed(each, router.limits.prompt_tokens)
            tokens += count
            call.record.count(tokens, 0)
            written = encode_vector(vector) if body.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": written})
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @api.post("/v1/tokenize", responses=answers(objects.Tokens))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation as the model's chat template writes it."""
        body = parse(TokenizeRequest, await json_body(request))
        call_of(request).record.about(body.model)
        model = get_router().model(body.model)
        ids = await model.tokenize(body.text(), body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.config.context})

    @api.post("/v1/detokenize", responses=answers(objects.Text))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens left out."""
        body = parse(DetokenizeRequest, await json_body(request))
        call_of(request).record.about(body.model)
        return JSONResponse({"prompt": await get_router().model(body.model).detokenize(body.tokens)})

    @api.get("/v1/models")
    async def models() -> objects.ModelList:
        return {"object": "list", "data": [objects.model_object(card, started) for card in get_router().cards()]}

    @api.get("/v1/models/{model}", responses={404: {"model": objects.ErrorObject}})
    async def model(model: str) -> objects.ModelObject:
        return objects.model_object(get_router().card(model), started)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The router answers."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"description": "Models wait for a replica"}})
    async def readyz() -> Response:
        """Every model has a running replica."""
        waiting = get_router().not_ready()
        body = {"status": "waiting", "not_ready": waiting} if waiting else {"status": "ok"}
        return JSONResponse(body, status_code=503 if waiting else 200)

    @api.exception_handler(NibbleError)
    async def nibble_error(request: Request, error: NibbleError) -> JSONResponse:
        call_of(request).failed(error)
        return error_response(error)

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        body = {"message": detail, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code, headers=error.headers)

    describe(api, lambda: [card.id for card in get_router().cards()])
    return api


def call_of(request: Request) -> HttpCall:
    call: HttpCall = request.state.call
    return call


async def json_body(request: Request) -> Any:
    """Raises InvalidRequestError for a body that is no JSON (NaN and Infinity are none)."""
    try:
        return json.loads(await request.body(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"body: not valid JSON: {error}") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


async def begun(items: AsyncGenerator[ChoiceChunk | None, None]) -> AsyncGenerator[ChoiceChunk | None, None]:
    """The same items, the first of them awaited now: an error before it can still choose the response's status. A
    request that waits long gives a None first, and its status is then 200 whatever follows."""
    first = await anext(items)

    async def all_items() -> AsyncGenerator[ChoiceChunk | None, None]:
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    return all_items()


def event_stream(events: AsyncGenerator[str, None]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def used(call: HttpCall) -> objects.Usage:
    return objects.usage_object(call.record.prompt_tokens, call.record.completion_tokens)


def encode_vector(vector: Sequence[float]) -> str:
    """As OpenAI's clients ask for it unless told otherwise: little-endian float32 in base64."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
