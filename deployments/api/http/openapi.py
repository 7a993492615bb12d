"""GET /openapi.json: what the HTTP API takes and gives, exact enough for a fuzzer. Bodies are parsed by nibble itself,
to word the errors its own way, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deployments.api.http.openai_objects import ErrorObject
from deployments.api.requests.body import Body
from deployments.api.requests.parsing import body_schema
from deployments.api.requests.responses import ResponsesRequest
from deployments.api.requests.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
}
ERRORS = {
    400: "A field is wrong: the message names it, what was found and what is allowed",
    401: "No API key, or a wrong one, where the server wants one",
    404: "No such model",
    413: "The body is too large",
    429: "The model's queue is full, or a limit of the API key is reached",
    503: "The model has no replica yet",
    504: "The request took longer than allowed",
}
KEY_SCHEME = "key"
EVENT = {
    "type": "object",
    "description": "An event of a stream: its data is a chunk or an event as JSON, an error object, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}


def answers(model: Any, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation: `model`, server-sent events where it streams, and the errors."""
    ok: dict[str, Any] = {"model": model}
    if streams:
        ok["content"] = {"text/event-stream": {"schema": EVENT}}
    return {200: ok, **{code: {"model": ErrorObject, "description": text} for code, text in ERRORS.items()}}


def describe(api: FastAPI, model_names: Callable[[], list[str]]) -> None:
    """Makes `api` give the whole document; the names of the served models are known at the first request only."""

    def openapi() -> dict[str, Any]:
        if not api.openapi_schema:
            document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
            schemas = document["components"]["schemas"]
            for path, body_class in BODIES.items():
                schema = body_schema(body_class)
                schemas |= schema.pop("$defs", {})
                schema["properties"]["model"]["enum"] = model_names()
                schemas[body_class.__name__] = schema
                reference = {"$ref": f"#/components/schemas/{body_class.__name__}"}
                operation = document["paths"][path]["post"]
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
            document["components"]["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {KEY_SCHEME: []}]
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
