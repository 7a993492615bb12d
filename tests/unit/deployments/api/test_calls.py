from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import AuthConfig, LoggingConfig
from cluster.errors import (
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RateLimitError,
    UnauthenticatedError,
)
from deployments.api.access import Access, hash_of
from deployments.api.calls import Call, Calls

KEY = "nbl-the-key"
PATH = "POST /v1/completions"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def serve_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a replica, where Serve's logger has handlers of its own and hands nothing on."""
    parent = logging.getLogger("ray.serve")
    monkeypatch.setattr(parent, "handlers", [caplog.handler])
    monkeypatch.setattr(parent, "propagate", False)
    caplog.set_level(logging.INFO, "ray.serve")


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., Calls]:
    """Calls with one key, alice's."""

    def calls(prompts: bool = False, **limits: int) -> Calls:
        file = tmp_path / "keys.yaml"
        file.write_text(yaml.safe_dump([{"name": "alice", "sha256": hash_of(KEY), **limits}]))
        access = Access(AuthConfig(api_keys_file=file), clock)
        now = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
        return Calls(access, LoggingConfig(prompts=prompts), clock, lambda: now)

    return calls


def admitted(calls: Calls) -> Call:
    call = calls.begin("http", PATH, None)
    call.admit(KEY)
    return call


def line_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    line = json.loads(message)
    assert line["level"] == record.levelname
    return dict(line)


def test_a_request_is_one_line_with_all_that_it_took(
    make: Callable[..., Calls], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    call = make().begin("http", PATH, "my-id")
    call.admit(KEY)
    clock.now += 0.5
    call.first_token()
    clock.now += 1
    call.first_token()
    call.about("llama")
    call.count(7, 3)
    call.count(7, 20)
    call.end(200)
    assert line_of(caplog) == {
        "time": "2026-01-02T03:04:05.678+00:00",
        "level": "INFO",
        "request_id": "my-id",
        "protocol": "http",
        "method": PATH,
        "key": "alice",
        "model": "llama",
        "status": 200,
        "error": None,
        "prompt_tokens": 7,
        "completion_tokens": 20,
        "seconds": 1.5,
        "first_token_seconds": 0.5,
    }


def test_a_request_ends_once(make: Callable[..., Calls], caplog: pytest.LogCaptureFixture) -> None:
    calls = make(max_concurrent=1)
    call = admitted(calls)
    call.end("OK")
    call.end("INTERNAL", ValueError())
    assert line_of(caplog)["status"] == "OK"
    admitted(calls)
    with pytest.raises(RateLimitError):
        admitted(calls)


def test_a_stream_is_charged_as_it_goes(make: Callable[..., Calls]) -> None:
    calls = make(tokens_per_minute=100)
    call = admitted(calls)
    for completed in range(90):
        call.count(10, completed)
    admitted(calls)  # 99 of 100
    call.count(10, 90)
    with pytest.raises(RateLimitError):
        admitted(calls)


def test_what_was_not_admitted_is_told_with_the_key_s_name_if_there_is_one(
    make: Callable[..., Calls], caplog: pytest.LogCaptureFixture
) -> None:
    calls = make(max_concurrent=1)
    for presented, kind, name in (
        (None, UnauthenticatedError, None),
        ("nbl-other", UnauthenticatedError, None),
        (KEY, None, "alice"),
        (KEY, RateLimitError, "alice"),
    ):
        caplog.clear()
        call = calls.begin("grpc", "/nibble.v1.Inference/Generate", None)
        if kind is None:
            call.admit(presented)
            continue
        with pytest.raises(kind) as error:
            call.admit(presented)
        call.end("REFUSED", error.value)
        line = line_of(caplog)
        assert (line["key"], line["level"], line["first_token_seconds"]) == (name, "WARNING", None)
        assert line["error"] == str(error.value)
        assert "nbl-" not in caplog.text


def test_without_keys_a_request_has_no_name(caplog: pytest.LogCaptureFixture) -> None:
    call = Calls(Access(AuthConfig()), LoggingConfig()).begin("http", PATH, None)
    call.admit("whatever")
    call.end(200)
    assert line_of(caplog)["key"] is None
    assert "whatever" not in caplog.text


@pytest.mark.parametrize("given", ["a", "A.b_c:d-9", "x" * 128])
def test_a_client_s_request_id_is_kept(make: Callable[..., Calls], given: str) -> None:
    assert make().begin("http", PATH, given).request_id == given


@pytest.mark.parametrize("given", [None, "", "a b", "a\n", "ä", "x" * 129, '"', "../a"])
def test_any_other_gets_a_new_one(make: Callable[..., Calls], given: str | None) -> None:
    calls = make()
    ids = {calls.begin("http", PATH, given).request_id for _ in range(2)}
    assert len(ids) == 2
    assert all(len(id) == 32 and int(id, 16) for id in ids)


def test_prompts_are_logged_when_asked_for(make: Callable[..., Calls], caplog: pytest.LogCaptureFixture) -> None:
    call = admitted(make(prompts=True))
    call.note(prompt=["a\nb", "\u2028\ud83d"])
    call.note(completion="c")
    call.note(completion="d\n")
    call.end(200)
    line = line_of(caplog)
    assert (line["prompt"], line["completion"]) == (["a\nb", "\u2028\ud83d"], "cd\n")
    assert caplog.records[0].getMessage().isascii()


@pytest.mark.parametrize(
    ("error", "level", "told"),
    [
        (InvalidRequestError("stop: found 'secret'; too long", "stop[0]"), "WARNING", "refused: stop[0]"),
        (InvalidRequestError("body: found 'secret'"), "WARNING", "refused: body"),
        (QueueFullError("model echo: full"), "WARNING", "model echo: full"),
        (EngineError("engine: broke"), "ERROR", "engine: broke"),
        (ValueError("secret"), "ERROR", "internal error; the server's log has the details"),
    ],
)
def test_nothing_else_tells_the_prompt_the_key_or_its_hash(
    make: Callable[..., Calls], caplog: pytest.LogCaptureFixture, error: Exception, level: str, told: str
) -> None:
    call = admitted(make())
    call.note(prompt="secret", completion="secret")
    call.end(400, error)
    line = line_of(caplog)
    assert (line["level"], line["error"]) == (level, told)
    assert not {"prompt", "completion"} & line.keys()
    for hidden in ("secret", KEY, hash_of(KEY)):
        assert hidden not in caplog.text


def test_with_prompts_an_error_tells_what_was_found(
    make: Callable[..., Calls], caplog: pytest.LogCaptureFixture
) -> None:
    call = admitted(make(prompts=True))
    call.end(400, InvalidRequestError("stop: found 'x'", "stop"))
    assert line_of(caplog)["error"] == "stop: found 'x'"


def test_a_long_name_does_not_fill_the_log(make: Callable[..., Calls], caplog: pytest.LogCaptureFixture) -> None:
    name = "m" * 100_000
    call = admitted(make())
    call.model = name
    call.end(404, ModelNotFoundError(f"model: found {name!r}, served are llama"))
    assert len(caplog.records[0].getMessage()) < 2000
