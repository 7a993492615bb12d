"""The client on servers of this process: nibble's own app over HTTP, a servicer of a few lines over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
import uvicorn
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2_grpc

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from cluster.errors import (
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    NibbleError,
    QueueFullError,
    RateLimitError,
    RequestTooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from cluster.ray_cluster import free_ports
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.operations import Operations
from deployments.client import AsyncNibbleClient, NibbleClient
from deployments.client.grpc_errors import error_of
from deployments.client.grpc_transport import put_options
from deployments.client.http_transport import response_error
from deployments.client.messages import TokenLogprob
from deployments.error_statuses import STATUSES, openai_error
from deployments.routing.router import Router
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import add_InferenceServicer_to_server
from tests.unit.echo_servicer import Health, Servicer
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import http_api

PROMPT = "to be or not"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]


@pytest.fixture
def http_url(model: EchoModel) -> Iterator[str]:
    router = Router({"echo": model, "absent": EchoModel("absent", ready=False)}, LimitsConfig())
    calls = Calls(Access(AuthConfig()), LoggingConfig())
    (port,) = free_ports(1)
    app = http_api(Operations(router, calls))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def grpc_url(servicer: Servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


def assert_refused_unsent(grpc_url: str, servicer: Servicer, ask: Callable[[NibbleClient], Any], field: str) -> None:
    """The client itself refuses what `ask` asks, by the field's name."""
    with NibbleClient(grpc_url) as client, pytest.raises(InvalidRequestError) as error:
        ask(client)
    assert error.value.field == field
    assert servicer.requests == []


def answers(url: str) -> dict[str, Any]:
    """Of everything the blocking client can do."""
    with NibbleClient(url) as client:
        stream = client.stream("echo", PROMPT, logprobs=1)
        pieces, chat = list(stream), client.stream_chat("echo", MESSAGES)
        return {
            "complete": client.complete("echo", PROMPT, max_tokens=9, stop="x", logprobs=1),
            "stream": [(piece.index, piece.text, piece.finish_reason) for piece in pieces],
            "usage": stream.usage,
            "chat": client.chat("echo", MESSAGES, logprobs=True, top_logprobs=1),
            "stream_chat": "".join(piece.text for piece in chat),
            "chat usage": chat.usage,
            "tokenize": client.tokenize("echo", PROMPT, add_special_tokens=False),
            "tokenize chat": client.tokenize("echo", MESSAGES),
            "detokenize": client.detokenize("echo", [1, 3]),
            "embed": client.embed("echo", [PROMPT, "a"]),
            "embed ids": client.embed("echo", [4, 5]),
            "models": client.models(),
            "ready": client.ready(),
        }


async def async_answers(url: str) -> dict[str, Any]:
    async with AsyncNibbleClient(url) as client:
        stream = client.stream("echo", PROMPT, logprobs=1)
        pieces, chat = [piece async for piece in stream], client.stream_chat("echo", MESSAGES)
        return {
            "complete": await client.complete("echo", PROMPT, max_tokens=9, stop="x", logprobs=1),
            "stream": [(piece.index, piece.text, piece.finish_reason) for piece in pieces],
            "usage": stream.usage,
            "chat": await client.chat("echo", MESSAGES, logprobs=True, top_logprobs=1),
            "stream_chat": "".join([piece.text async for piece in chat]),
            "chat usage": chat.usage,
            "tokenize": await client.tokenize("echo", PROMPT, add_special_tokens=False),
            "tokenize chat": await client.tokenize("echo", MESSAGES),
            "detokenize": await client.detokenize("echo", [1, 3]),
            "embed": await client.embed("echo", [PROMPT, "a"]),
            "embed ids": await client.embed("echo", [4, 5]),
            "models": await client.models(),
            "ready": await client.ready(),
        }


async def test_answers_are_the_same_over_both_protocols_blocking_or_not(http_url: str, grpc_url: str) -> None:
    found = answers(http_url)
    assert found["complete"].text == found["stream_chat"] == "to be or not "
    assert found["complete"].choices[0].logprobs[1] == TokenLogprob("be ", -0.5, (("zero", -1.0),), 3)
    assert found["stream"][-1] == (0, "not ", "stop")
    assert found["usage"] == found["chat usage"] == found["complete"].usage
    assert found["usage"].total_tokens == 8
    assert found["embed ids"].vectors == ((0.5, -1.0, 2.0),)
    assert found["ready"] is False
    for others in (answers(grpc_url), await async_answers(http_url), await async_answers(grpc_url)):
        assert others == found


def test_a_request_id_goes_there_and_comes_back(url: str) -> None:
    with NibbleClient(url) as client:
        assert client.complete("echo", "a", request_id="mine-1").request_id == "mine-1"


def test_the_api_key_of_the_environment_is_sent(
    grpc_url: str, servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_API_KEY", "nbl-secret")
    with NibbleClient(grpc_url) as client:
        client.complete("echo", "a")
    assert servicer.metadata["authorization"] == "Bearer nbl-secret"


ERRORS = [
    InvalidRequestError("top_p: found 5", "top_p"),
    RequestTooLargeError("message: found 5 bytes, allowed are up to 3 (limits.body_bytes)"),
    UnauthenticatedError("no API key was given"),
    ModelNotFoundError("model: found 'x'"),
    QueueFullError("model echo: full", 3),
    RateLimitError("API key alice: used up", 4),
    DeadlineError("model echo: too late"),
    UnavailableError("model echo: no replica is ready yet"),
]


def test_every_error_of_the_table_is_tried() -> None:
    assert {type(error) for error in ERRORS} == set(STATUSES)


def same(found: BaseException, raised: NibbleError) -> bool:
    return type(found) is type(raised) and vars(found) == vars(raised) and str(found) == str(raised)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_errors_come_back_as_they_were_raised_over_grpc(
    grpc_url: str, servicer: Servicer, error: NibbleError
) -> None:
    servicer.error = error
    with NibbleClient(grpc_url) as client:
        with pytest.raises(NibbleError) as whole:
            client.complete("echo", PROMPT)
        assert same(whole.value, error)
        stream = client.stream("echo", PROMPT)
        assert next(stream).text == "to "
        with pytest.raises(NibbleError) as broken:
            next(stream)
        assert same(broken.value, error)
    async with AsyncNibbleClient(grpc_url) as other:
        with pytest.raises(NibbleError) as whole:
            await other.complete("echo", PROMPT)
        assert same(whole.value, error)


UNLIKE = [  # what no message tells
    InvalidRequestError("found 3, allowed are up to 2", "temperature"),
    InvalidRequestError("temperature: found 3"),
    RequestTooLargeError("too many bytes"),
    QueueFullError("API key queue: full", 3),
    RateLimitError("used up", 4),
]


@pytest.mark.parametrize("error", [*ERRORS, *UNLIKE], ids=lambda error: type(error).__name__)
async def test_errors_are_known_by_their_details_whatever_the_message_says(
    grpc_url: str, servicer: Servicer, error: NibbleError
) -> None:
    servicer.error, servicer.details = error, True
    with NibbleClient(grpc_url) as client:
        with pytest.raises(NibbleError) as whole:
            client.complete("echo", PROMPT)
        assert same(whole.value, error)
    async with AsyncNibbleClient(grpc_url) as other:
        with pytest.raises(NibbleError) as whole:
            await other.complete("echo", PROMPT)
        assert same(whole.value, error)


@pytest.mark.parametrize("details", [b"\xff", status_pb2.Status(code=5, message="other").SerializeToString()])
def test_details_that_are_wrong_are_not_used(details: bytes) -> None:
    class Call:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self) -> str:
            return "API key alice: used up"

        def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
            return [("retry-after", "4"), ("grpc-status-details-bin", details)]

    assert same(error_of("grpc://a:1", Call()), RateLimitError("API key alice: used up", 4))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_come_back_as_they_were_raised_over_http(http_url: str, model: EchoModel, error: NibbleError) -> None:
    model.error = error
    with NibbleClient(http_url) as client:
        with pytest.raises(NibbleError) as whole:
            client.complete("echo", PROMPT)
        assert same(whole.value, error)
        model.error_at = 1
        stream = client.stream("echo", PROMPT)
        assert next(stream).text == "to "
        with pytest.raises(type(error), match=str(error)[:8]):
            next(stream)


def test_an_unknown_model_is_told(http_url: str) -> None:
    with NibbleClient(http_url) as client, pytest.raises(ModelNotFoundError, match="served are absent, echo"):
        client.stream("gpt-5", "a").__next__()


def test_what_is_no_answer_of_nibble_is_shown() -> None:
    request = httpx.Request("GET", "http://a/v1")
    found = response_error(httpx.Response(502, text="<html>Bad Gateway", request=request))
    assert str(found) == "http://a/v1: HTTP 502: <html>Bad Gateway"
    error = openai_error(RuntimeError("x"))
    assert type(response_error(httpx.Response(500, json=error, request=request))) is NibbleError


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_where_nobody_listens_the_url_is_named(scheme: str) -> None:
    (port,) = free_ports(1)
    url = f"{scheme}://127.0.0.1:{port}"
    with NibbleClient(url) as client, pytest.raises(NibbleError, match=f"^{url}: .*is `nibble serve` running there"):
        client.models()
    async with AsyncNibbleClient(url) as other:
        with pytest.raises(NibbleError, match=f"^{url}: .*is `nibble serve` running there"):
            _ = [piece async for piece in other.stream("echo", "a")]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://a:1", "grpc://a", "grpc://a:x", "http://", ""])
def test_a_url_without_its_scheme_or_port_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="allowed are http://HOST:PORT and grpc://HOST:PORT"):
        NibbleClient(url)


@pytest.mark.parametrize("name", ["stream", "stream_options"])
def test_what_the_client_sets_itself_is_refused(url: str, name: str) -> None:
    with NibbleClient(url) as client, pytest.raises(InvalidRequestError, match=f"{name}: the client sets it itself"):
        client.complete("echo", "a", **{name: None})


def test_closing_a_stream_cancels_the_call(grpc_url: str, servicer: Servicer) -> None:
    with NibbleClient(grpc_url) as client, client.stream("echo", "endless words") as stream:
        next(stream)
        assert not servicer.left.is_set()
        stream.close()
        assert servicer.left.wait(30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "x", "seed": None}, {"stop": ["x"]}),
        ({"stop": ["x", "y"], "n": 2}, {"stop": ["x", "y"], "n": 2}),
        ({"top_k": -1, "seed": -1}, {"top_k": 0, "seed": (1 << 64) - 1}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100}}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, {"json_schema": "{}"}),
        ({"temperature": 0, "echo": False, "logprobs": 0}, {"temperature": 0, "echo": False, "logprobs": 0}),
    ],
)
def test_options_are_put_into_the_message(options: dict[str, Any], message: dict[str, Any]) -> None:
    request = pb.GenerateRequest()
    put_options(request, options)
    assert request == pb.GenerateRequest(**message)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda client: client.complete("echo", "a", best_off=2), "best_off"),
        (lambda client: client.complete("echo", "a", max_tokens=-1), "max_tokens"),
        (lambda client: client.complete("echo", "a", temperature="warm"), "temperature"),
        (lambda client: client.complete("echo", "a", response_format={"type": "xml"}), "response_format"),
        (lambda client: client.complete("echo", [-1]), "prompt"),
        (lambda client: client.complete("echo", 5), "prompt"),
        (lambda client: client.chat("echo", [{"role": "user"}]), "messages[0]"),
        (lambda client: client.chat("echo", [{"role": "user", "content": "a", "name": "x"}]), "messages[0].name"),
        (lambda client: client.detokenize("echo", ["x"]), "tokens"),
    ],
)
def test_what_a_message_cannot_hold_is_refused_by_its_name(
    grpc_url: str, servicer: Servicer, ask: Callable[[NibbleClient], Any], field: str
) -> None:
    assert_refused_unsent(grpc_url, servicer, ask, field)
