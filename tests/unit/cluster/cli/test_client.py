"""What asks a running server, from the command line's words to the requests of servers of this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import grpc
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.cli.options import plain_console
from cluster.cli.urls import client_url, with_scheme
from cluster.commands.chat import answer
from cluster.errors import ConfigError, QueueFullError
from deployments.client import NibbleClient, server_url
from deployments.client.messages import Piece
from protos.inference_pb2_grpc import add_InferenceServicer_to_server
from tests.unit.echo_servicer import Servicer
from tests.unit.sse_server import Answer, Body, SseServer, refusal


def run(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=input)


def echo(body: Body) -> Answer:
    """As nibble: the last message's or the prompt's words, an event each where a stream is wanted."""
    chat = "messages" in body
    words = (body["messages"][-1]["content"] if chat else body["prompt"]).split(" ")
    if words[0] == "refused":
        return refusal(400, "messages: too long")
    choices = [{"index": 0, "finish_reason": "stop" if word is words[-1] else None} for word in words]
    for choice, word in zip(choices, words, strict=True):
        choice.update({"delta": {"content": f"{word} "}} if chat else {"text": f"{word} "})
    if not body.get("stream"):
        whole = choices[-1] | {"text": " ".join(words)}
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 1)
        return 200, [json.dumps({"id": "c", "created": 1, "model": "m", "choices": [whole], "usage": usage})]
    events = [{"id": "c", "model": "m", "choices": [choice]} for choice in choices]
    return 200, [*(f"data: {json.dumps(event)}\n\n" for event in events), "data: [DONE]\n\n"]


@pytest.fixture
def http() -> Iterator[SseServer]:
    with SseServer(echo) as server:
        yield server


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def grpc_target(servicer: Servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_the_version_is_the_distribution_s() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"nibble {version('nibble-serve')}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_there_for_shells(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", shell], prog_name="nibble")
    assert script.exit_code == 0
    assert "_NIBBLE_COMPLETE=complete_" in script.output
    begun = {"_NIBBLE_COMPLETE": "complete_bash", "COMP_WORDS": "nibble ch", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], prog_name="nibble", env=begun).output.split() == ["chat"]


@pytest.mark.parametrize(
    ("written", "over_grpc", "url"),
    [
        (None, False, "http://127.0.0.1:8000"),
        (None, True, "grpc://127.0.0.1:9000"),
        ("host:80", False, "http://host:80"),
        ("host", False, "http://host"),
        ("host:80/v1", False, "http://host:80"),
        ("http://host:80/v1/", False, "http://host:80"),
        ("https://host/nibble/v1", False, "https://host/nibble"),
        ("http://[::1]:80", False, "http://[::1]:80"),
        ("host:90", True, "grpc://host:90"),
        ("grpc://host:90/", True, "grpc://host:90"),
        ("grpcs://host:90", False, "grpcs://host:90"),
    ],
)
def test_a_url_may_lack_its_scheme_and_have_v1(written: str | None, over_grpc: bool, url: str) -> None:
    assert server_url(client_url(written, over_grpc)) == url


def test_http_is_no_grpc() -> None:
    with pytest.raises(ConfigError, match=r"url: found http://host:80, with --grpc allowed are HOST:PORT, grpc://"):
        client_url("http://host:80", grpc=True)
    assert with_scheme("http://host:80", grpc=True) == "http://host:80"  # `nibble bench` may mix them


def test_generate_takes_a_url_as_people_write_it(http: SseServer) -> None:
    for url in (
        http.url,
        f"{http.url}/v1",
        http.url.removeprefix("http://"),
        f"{http.url.removeprefix('http://')}/v1/",
    ):
        assert run("generate", "m", "a b", "--url", url).output == "a b\n"
    assert http.paths == ["/v1/completions"] * 4


@pytest.mark.parametrize(
    ("input", "prompt"), [("a b\nc\n", "a b\nc"), ("a b", "a b"), ("a\r\n\n", "a\r\n"), ("é", "é"), ("- ", "- ")]
)
def test_a_prompt_of_a_dash_is_standard_input(input: str, prompt: str, http: SseServer) -> None:
    result = run("generate", "m", "-", "--url", http.url, input=input.encode())
    assert result.stdout_bytes.decode() == f"{prompt}\n"
    assert http.bodies[0]["prompt"] == prompt
    run("generate", "m", "-", "--chat", "--system", "s", "--stream", "--url", http.url, input=input.encode())
    assert http.bodies[1]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]


def test_standard_input_that_is_not_utf_8_is_refused(http: SseServer) -> None:
    result = run("generate", "m", "-", "--url", http.url, input=b"\xff")
    assert "prompt: standard input is not UTF-8" in str(result.exception)
    assert not http.bodies


def test_a_chat_sends_what_was_said_until_it_is_cleared(http: SseServer) -> None:
    lines = "hello you\n\nand [you]\n/clear\nagain\n"
    result = run("chat", "m", "--url", http.url, "--system", "s", "--seed", "3", input=lines)
    assert result.exit_code == 0
    assert f"m at {http.url}. /clear begins a new conversation" in result.output
    assert "hello you \n" in result.output
    assert "and [you] \n" in result.output
    system = {"role": "system", "content": "s"}
    first = [system, {"role": "user", "content": "hello you"}]
    second = [*first, {"role": "assistant", "content": "hello you "}, {"role": "user", "content": "and [you]"}]
    assert [body["messages"] for body in http.bodies] == [first, second, [system, {"role": "user", "content": "again"}]]
    assert all(body["stream"] and body["seed"] == 3 and body["max_tokens"] == 256 for body in http.bodies)


def test_what_the_server_refuses_is_left_out_of_the_chat(http: SseServer) -> None:
    result = run("chat", "m", "--url", http.url, input="hello\nrefused\nagain\n")
    assert result.exit_code == 0
    assert "messages: too long" in result.output
    assert [message["content"] for message in http.bodies[2]["messages"]] == ["hello", "hello ", "again"]


def test_a_chat_over_grpc(servicer: Servicer, grpc_target: str) -> None:
    result = run("chat", "echo", "--grpc", "--url", grpc_target, input="hello you\nagain\n")
    assert result.exit_code == 0
    assert "hello you \n" in result.output
    said = [[message.content for message in request.chat.messages] for request in servicer.requests]
    assert said == [["hello you"], ["hello you", "hello you ", "again"]]
    servicer.error = QueueFullError("model echo: its queue is full")
    result = run("chat", "echo", "--url", f"grpc://{grpc_target}", input="hello\n")
    assert "nibble: gRPC RESOURCE_EXHAUSTED: model echo: its queue is full" in result.output


class InterruptedClient(NibbleClient):
    closed = False

    def __init__(self) -> None: ...

    def stream_chat(self, *_: object, **__: object) -> InterruptedClient:  # type: ignore[override]
        return self

    def __iter__(self) -> Iterator[Piece]:
        yield Piece(0, "as far ", None)
        raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


def test_ctrl_c_ends_an_answer_and_keeps_what_had_come(capsys: pytest.CaptureFixture[str]) -> None:
    client = InterruptedClient()
    assert answer(client, "http://host", "m", [], {}, plain_console()) == "as far "
    assert client.closed
    assert capsys.readouterr().out == "as far \n"
