"""The HTTP side of the router: OpenAI's API, tokenization, health. What all requests pass on their way in and out
(request id, key, limits, log) is `deployments/api/http/http_calls.py`."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

from cluster.errors import NibbleError
from deployments.api.http import openai_objects as objects
from deployments.api.http.http_bodies import json_body
from deployments.api.http.http_calls import METRICS, CallMiddleware, HttpCall, call_of, error_response
from deployments.api.http.http_cors import Cors
from deployments.api.http.http_stream import (
    EventForms,
    begun,
    chat_events,
    completion_events,
    event_stream,
    stream_events,
)
from deployments.api.http.openapi import answers, describe
from deployments.api.http.responses import add_response_routes
from deployments.api.kserve.kserve_http import add_kserve_routes
from deployments.api.operations import GeneratingRequest, Operations
from deployments.api.requests.body import ModelBody
from deployments.api.requests.parsing import parse
from deployments.api.requests.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deployments.observability.exposition import exposition

GZIP_BYTES = 4096  # of an answer, from which on it is packed for clients that can unpack it


def build_http_api(get_operations: Callable[[], Operations]) -> FastAPI:
    """The ASGI app; the function is called for each request, since Serve builds the app before there are operations."""
    about = "INT4 inference of Hugging Face language models on CPUs"
    # Without FastAPI's pages of documentation, which fetch scripts from elsewhere.
    api = FastAPI(title="nibble", description=about, docs_url=None, redoc_url=None)
    api.add_middleware(CallMiddleware, get_operations=get_operations)
    api.add_middleware(Cors, get_origins=lambda: get_operations().cors_origins)
    # Quick rather than small; server-sent events are left as they are.
    api.add_middleware(GZipMiddleware, minimum_size=GZIP_BYTES, compresslevel=1)
    started = int(time.time())

    def with_model(request: Request, body: Any) -> Any:
        """vLLM serves one model, and its clients need not name it: at its own paths neither need they here, where one
        is served."""
        only = None if request.url.path.startswith("/v1/") else get_operations().only_model()
        unnamed = only is not None and isinstance(body, dict) and body.get("model") is None
        return {**body, "model": only} if unnamed else body

    @api.post("/v1/completions", responses=answers(objects.CompletionObject, streams=True))
    async def completions(request: Request) -> Response:
        """Text that continues a prompt. With `stream`, server-sent events ended by `data: [DONE]`."""
        operations, call = get_operations(), call_of(request)
        body = parse(CompletionRequest, await json_body(request))
        id, created = f"cmpl-{call.record.request_id}", int(time.time())
        if body.stream:
            return await stream(operations, call, body, id, completion_events(body, id, created))
        whole = await operations.generate(call.record, body, id)
        logged = body.logprobs is not None
        answer = objects.completion_object(id, created, body.model, whole, used(call), logged)
        return JSONResponse(objects.with_token_ids(answer, whole) if body.return_token_ids else answer)

    @api.post("/v1/chat/completions", responses=answers(objects.ChatObject, streams=True))
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message, by the model's chat template (a plain one for a model that has none)."""
        operations, call = get_operations(), call_of(request)
        body = parse(ChatRequest, await json_body(request))
        id, created = f"chatcmpl-{call.record.request_id}", int(time.time())
        if body.stream:
            return await stream(operations, call, body, id, chat_events(body, id, created))
        whole = await operations.generate(call.record, body, id)
        answer = objects.chat_object(id, created, body.model, whole, used(call), body.logprobs)
        return JSONResponse(objects.with_chat_token_ids(answer, whole) if body.return_token_ids else answer)

    @api.post("/v1/embeddings", responses=answers(objects.EmbeddingList))
    async def embeddings(request: Request) -> Response:
        """The model's last hidden state after each input, as the runtime gives it: not normalized."""
        body = parse(EmbeddingRequest, await json_body(request))
        vectors, tokens = await get_operations().embed(call_of(request).record, body)
        data: list[objects.Embedding] = [
            {
                "object": "embedding",
                "index": index,
                "embedding": encode_vector(vector) if body.encoding_format == "base64" else vector,
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @api.post("/tokenize", include_in_schema=False)
    @api.post("/v1/tokenize", responses=answers(objects.TokensObject))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation as the model's chat template writes it."""
        body = parse(TokenizeRequest, with_model(request, await json_body(request)))
        ids, context = await get_operations().tokenize(call_of(request).record, body)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})

    @api.post("/detokenize", include_in_schema=False)
    @api.post("/v1/detokenize", responses=answers(objects.Text))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens left out."""
        body = parse(DetokenizeRequest, with_model(request, await json_body(request)))
        return JSONResponse({"prompt": await get_operations().detokenize(call_of(request).record, body)})

    @api.get("/tokenizer_info", responses=answers(dict[str, Any]))
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        """The model's tokenizer_config.json and chat template; the model may be left out where one is served."""
        body = parse(ModelBody, with_model(request, {"model": model}))
        return JSONResponse(await get_operations().tokenizer_info(call_of(request).record, body.model))

    @api.get("/v1/models")
    async def models() -> objects.ModelList:
        return {"object": "list", "data": [objects.model_object(card, started) for card in get_operations().models()]}

    @api.get("/v1/models/{model:path}", responses={404: {"model": objects.ErrorObject}})
    async def model(model: str) -> objects.ModelObject:
        return objects.model_object(get_operations().model(model), started)

    @api.get("/health", include_in_schema=False)
    @api.get("/ping", include_in_schema=False)
    @api.post("/ping", include_in_schema=False)
    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The router answers."""
        return {"status": "ok"}

    @api.get(METRICS, response_class=PlainTextResponse, responses={401: {"model": objects.ErrorObject}})
    async def metrics(request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics where the client accepts it, of all routers and replicas."""
        content, media_type = exposition(await get_operations().metrics(), request.headers.get("accept"))
        return Response(content, headers={"Content-Type": media_type})

    @api.get("/version")
    async def nibble_version() -> dict[str, str]:
        return {"version": version("nibble-serve")}

    @api.get("/readyz", responses={503: {"description": "Models wait for a replica"}})
    async def readyz() -> Response:
        """Every model takes requests."""
        waiting = get_operations().not_ready()
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

    add_response_routes(api, get_operations)
    add_kserve_routes(api, get_operations)
    describe(api, lambda: [card.id for card in get_operations().models()])
    return api


async def stream(
    operations: Operations, call: HttpCall, body: GeneratingRequest, id: str, events: EventForms
) -> StreamingResponse:
    """Server-sent events."""
    generation = await begun(operations, call, body, id)
    return event_stream(stream_events(generation, operations.limits.keep_alive_s, *events, body, call))


def used(call: HttpCall) -> objects.UsageObject:
    return objects.usage_object(call.record.prompt_tokens, call.record.completion_tokens, call.record.cached_tokens)


def encode_vector(vector: Sequence[float]) -> str:
    """As OpenAI's clients ask for it unless told otherwise: little-endian float32 in base64."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
