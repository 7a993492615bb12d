"""What every gRPC request passes: its id, the key, limits, the log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from cluster.config import AuthConfig
from cluster.errors import DeadlineError, InvalidRequestError, QueueFullError
from deployments.api.grpc.grpc_api import GrpcApi
from deployments.api.grpc.grpc_calls import tell
from protos import inference_pb2 as pb
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import CHAT, Context, api_of, ask, log_lines, stream

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def request_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ray.serve.requests")
    return caplog


@pytest.fixture
def api(model: EchoModel) -> GrpcApi:
    return api_of(model)


async def test_an_unforeseen_error_is_internal_and_keeps_its_words(
    api: GrpcApi, model: EchoModel, request_log: pytest.LogCaptureFixture
) -> None:
    model.error = RuntimeError("the secret")
    context = Context()
    await api.Generate(ask(prompt="a"), context)
    assert context.code == grpc.StatusCode.INTERNAL
    assert "secret" not in context.details
    assert "the secret" in request_log.text
    assert (log_lines(request_log)[0]["status"], log_lines(request_log)[0]["level"]) == ("INTERNAL", "ERROR")


async def test_an_error_has_its_details_in_the_trailing_metadata(api: GrpcApi) -> None:
    context = Context(x_request_id="first")
    await api.Generate(ask(prompt="a", temperature=9), context)
    status = status_pb2.Status.FromString(context.binary["grpc-status-details-bin"])
    assert (status.code, status.message) == (INVALID.value[0], context.details)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "nibble")
    assert status.details[1].Unpack(request)
    assert [violation.field for violation in request.field_violations] == ["temperature"]
    assert context.trailing["x-request-id"] == "first"


def test_details_say_when_to_come_back() -> None:
    context, retry = Context(), error_details_pb2.RetryInfo()
    tell(context, QueueFullError("full", 7))
    status = status_pb2.Status.FromString(context.binary["grpc-status-details-bin"])
    assert status.details[1].Unpack(retry)
    assert (retry.retry_delay.seconds, context.trailing["retry-after"]) == (7, "7")


def test_details_of_a_long_message_are_left_out() -> None:
    context = Context()
    tell(context, QueueFullError("long" * 1000))
    assert set(context.trailing) == {"retry-after"}


def test_a_message_that_is_no_unicode_can_be_told() -> None:
    context = Context()
    tell(context, InvalidRequestError("stop: found \ud800", "stop"))
    assert status_pb2.Status.FromString(context.binary["grpc-status-details-bin"]).message == "stop: found ?"


async def test_a_message_beyond_the_limit_is_refused(model: EchoModel) -> None:
    context = Context()
    await api_of(model, body_bytes=100).Generate(ask(prompt="a" * 100), context)
    assert (context.code, "limits.body_bytes" in context.details, model.requests) == (INVALID, True, [])


async def test_each_request_has_a_line_in_the_log(model: EchoModel, request_log: pytest.LogCaptureFixture) -> None:
    api = api_of(model, prompts=True)
    await api.Generate(ask(prompt="to be"), Context(x_request_id="first"))
    await stream(api, ask(prompt="or not", temperature=9), Context(x_request_id="second"))
    await stream(api, ask(chat=CHAT), Context())
    done, refused, chat = log_lines(request_log)
    assert (done["request_id"], done["protocol"], done["method"]) == ("first", "grpc", "/nibble.v1.Inference/Generate")
    assert (done["status"], done["model"], done["prompt_tokens"], done["completion_tokens"]) == ("OK", "echo", 2, 2)
    assert (done["prompt"], done["completion"]) == ("to be", "to be ")
    assert (refused["request_id"], refused["status"]) == ("second", "INVALID_ARGUMENT")
    assert "temperature" in refused["error"]
    assert chat["prompt"][1] == {"role": "user", "content": "a b"}
    assert (chat["completion"], chat["first_token_seconds"] is not None) == ("a b ", True)


async def test_a_client_that_leaves_ends_the_generation(
    api: GrpcApi, model: EchoModel, request_log: pytest.LogCaptureFixture
) -> None:
    messages = api.GenerateStream(ask(prompt="to be or not"), Context())
    await anext(messages)
    await messages.aclose()
    assert model.closed == 1
    model.delay_s = 3600
    task = asyncio.create_task(api.Generate(ask(prompt="to be"), Context()))
    while len(model.requests) < 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.closed == 2
    assert [line["status"] for line in log_lines(request_log)] == ["CANCELLED", "CANCELLED"]


async def test_what_an_unfinished_request_has_taken_is_counted(
    api: GrpcApi, model: EchoModel, request_log: pytest.LogCaptureFixture
) -> None:
    model.error, model.error_at = DeadlineError("late"), 2
    await api.Generate(ask(prompt="to be or not"), Context())
    (line,) = log_lines(request_log)
    assert (line["prompt_tokens"], line["completion_tokens"], line["first_token_seconds"] is None) == (4, 2, False)


async def test_keys(model: EchoModel, tmp_path: Path, request_log: pytest.LogCaptureFixture) -> None:
    digest = hashlib.sha256(b"nbl-key").hexdigest()
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: alice, sha256: {digest}, tokens_per_minute: 1}}\n")
    api = api_of(model, AuthConfig(api_keys_file=file))
    for context in (Context(), Context(authorization="Bearer nbl-other")):
        await api.ListModels(pb.ListModelsRequest(), context)
        assert context.code == grpc.StatusCode.UNAUTHENTICATED
        assert context.trailing["www-authenticate"] == "Bearer"
    assert len((await api.ListModels(pb.ListModelsRequest(), Context(authorization="Bearer nbl-key"))).models) == 2
    assert (await api.Generate(ask(prompt="a b"), Context(x_api_key="nbl-key"))).usage.total_tokens == 4
    spent = Context(x_api_key="nbl-key")
    await api.Generate(ask(prompt="a b"), spent)
    assert spent.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(spent.trailing["retry-after"]) > 0
    assert [line["key"] for line in log_lines(request_log)] == [None, None, "alice", "alice", "alice"]
    # Health needs none.
    assert (await api.Check(health_pb2.HealthCheckRequest(service="echo"), Context())).status == 1
