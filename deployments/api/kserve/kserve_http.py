"""The KServe Open Inference Protocol over HTTP: `/v2`. A request becomes the message of `protos/open_inference.proto`,
so that JSON and gRPC are understood, refused and answered by the same code (`kserve_api.py`). Beside inference there
are the `generate` and `generate_stream` of KServe and Triton: one text in, one text out. Inputs may be binary, as
Triton's clients send them unless told otherwise (its binary tensor data extension); outputs are JSON.

Health and readiness want no key, as over gRPC. Errors are `{"error": a text}`, as the protocol has them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.responses import Response

from cluster.errors import InvalidRequestError, NibbleError
from deployments.api.access import bearer_key
from deployments.api.http.http_bodies import parsed_json
from deployments.api.http.http_calls import HttpCall, call_of
from deployments.api.http.http_stream import KEEP_ALIVE, begun, event_stream, sse
from deployments.api.kserve import kserve_api as kserve
from deployments.api.kserve import kserve_models as models
from deployments.api.kserve.kserve_json import (
    JSON_LENGTH,
    generate_request,
    infer_request,
    known,
    message_object,
    response_object,
)
from deployments.api.operations import Generation, Operations
from deployments.error_statuses import headers_of, public_message, status_of
from protos import open_inference_pb2 as pb


class KserveRoute(APIRoute):
    """A route whose errors have the protocol's form."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except NibbleError as error:
                call_of(request).failed(error)
                return JSONResponse(error_object(error), status_of(error).http, headers_of(error))

        return handled


def add_kserve_routes(api: FastAPI, get_operations: Callable[[], Operations]) -> None:
    # Of two decorators the lower one is tried first: names of models may have slashes.
    routes = APIRouter(prefix="/v2", route_class=KserveRoute, include_in_schema=False)

    @routes.get("/health/live")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @routes.get("/health/ready")
    async def ready() -> Response:
        return readiness("ready", not get_operations().not_ready())

    @routes.get("/models/{model:path}/ready")
    @routes.get("/models/{model:path}/versions/{model_version}/ready")
    async def model_ready(model: str, model_version: str = "") -> Response:
        models.check_version(model_version, "version")
        return readiness("ready", models.model_ready(get_operations(), model), name=model)

    @routes.get("")
    async def server(request: Request) -> Response:
        admit(request)
        return JSONResponse(message_object(models.server_metadata()))

    @routes.post("/repository/index")
    async def index(request: Request) -> Response:
        admit(request)
        body = await object_body(request) if await request.body() else {}
        known(body, ("ready",), "")
        if not isinstance(body.get("ready", False), bool):
            raise InvalidRequestError(f"ready: found {body['ready']!r:.40}, allowed are true and false", "ready")
        asked = pb.RepositoryIndexRequest(ready=body.get("ready", False))
        return JSONResponse(message_object(models.repository_index(get_operations(), asked))["models"])

    @routes.get("/models/{model:path}/config")
    @routes.get("/models/{model:path}/versions/{model_version}/config")
    async def config(request: Request, model: str, model_version: str = "") -> Response:
        admit(request).record.about(model)
        return JSONResponse(message_object(models.model_config(get_operations(), model, model_version)))

    @routes.get("/models/stats")
    @routes.get("/models/{model:path}/stats")
    @routes.get("/models/{model:path}/versions/{model_version}/stats")
    async def statistics(request: Request, model: str = "", model_version: str = "") -> Response:
        admit(request)
        return JSONResponse(message_object(await models.model_statistics(get_operations(), model, model_version)))

    @routes.get("/models/{model:path}")
    @routes.get("/models/{model:path}/versions/{model_version}")
    async def model(request: Request, model: str, model_version: str = "") -> Response:
        admit(request).record.about(model)
        return JSONResponse(message_object(models.model_metadata(get_operations(), model, model_version)))

    @routes.post("/models/{model:path}/infer")
    @routes.post("/models/{model:path}/versions/{model_version}/infer")
    async def infer(request: Request, model: str, model_version: str = "") -> Response:
        call = admit(request)
        call.record.about(model)
        body, binary = await split_body(request)
        message = infer_request(body, model, model_version, binary)
        response = await inferred(get_operations(), call, message)
        return JSONResponse(response_object(response))

    @routes.post("/models/{model:path}/generate")
    @routes.post("/models/{model:path}/versions/{model_version}/generate")
    async def generate(request: Request, model: str, model_version: str = "") -> Response:
        call = admit(request)
        call.record.about(model)
        message = generate_request(await object_body(request), model, model_version)
        response = await inferred(get_operations(), call, message)
        texts = {each.name: each.contents.bytes_contents[0].decode() for each in response.outputs}
        return JSONResponse({"model_name": model, "model_version": models.MODEL_VERSION, **texts})

    @routes.post("/models/{model:path}/generate_stream")
    @routes.post("/models/{model:path}/versions/{model_version}/generate_stream")
    async def generate_stream(request: Request, model: str, model_version: str = "") -> Response:
        call, operations = admit(request), get_operations()
        call.record.about(model)
        message = generate_request(await object_body(request), model, model_version)
        completion = kserve.infer_record(message).completion
        generation = await begun(operations, call, completion, call.record.request_id)
        return event_stream(stream_events(generation, operations.limits.keep_alive_s, call, model))

    api.include_router(routes)


def error_object(error: Exception) -> dict[str, str]:
    """A name in a request may be half a surrogate pair, which UTF-8 has no bytes for."""
    return {"error": public_message(error).encode(errors="replace").decode()}


def admit(request: Request) -> HttpCall:
    """Raises UnauthenticatedError."""
    call = call_of(request)
    call.record.admit(bearer_key(request.headers.get("authorization")))
    return call


def readiness(field: str, value: bool, **fields: str) -> Response:
    """Clients and probes look at the status alone."""
    return JSONResponse({**fields, field: value}, status_code=200 if value else 503)


async def object_body(request: Request) -> dict[str, Any]:
    return json_object(await request.body())


def json_object(content: bytes) -> dict[str, Any]:
    body = parsed_json(content)
    if not isinstance(body, dict):
        raise InvalidRequestError("body: expected a JSON object")
    return body


async def split_body(request: Request) -> tuple[dict[str, Any], bytes]:
    """The JSON object, and the binary data behind it."""
    body, given = await request.body(), request.headers.get(JSON_LENGTH)
    if given is None:
        return json_object(body), b""
    if not (given.isascii() and given.isdecimal() and len(given) < 20 and int(given) <= len(body)):
        raise InvalidRequestError(
            f"{JSON_LENGTH}: found {given!r:.40}, allowed are 0 to {len(body)}, the body's length", JSON_LENGTH
        )
    return json_object(body[: int(given)]), body[int(given) :]


async def inferred(operations: Operations, call: HttpCall, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
    record = kserve.infer_record(message)._replace(raw=False)
    if record.completion.stream:
        raise InvalidRequestError("stream: allowed only in generate_stream", "stream")
    return await kserve.whole_response(operations, call.record, message, record)


async def stream_events(
    generation: Generation, keep_alive_s: float, call: HttpCall, model: str
) -> AsyncGenerator[str, None]:
    """An event a chunk, with the text that is new, and a comment whenever the first one takes another `keep_alive_s`;
    an error is an event of its own."""
    try:
        async with aclosing(generation):
            while not await generation.first_came(keep_alive_s):
                yield KEEP_ALIVE
            async for _, chunk in generation:
                fields = {models.OUTPUTS[0]: chunk.text, models.OUTPUTS[1]: chunk.finish_reason or ""}
                yield sse({"model_name": model, "model_version": models.MODEL_VERSION, **fields})
    except Exception as error:  # noqa: BLE001 - the status line is gone: the client must hear of it in the stream
        call.failed(error)
        yield sse(error_object(error))
