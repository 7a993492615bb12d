"""What `nibble serve` says of access, without serving."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.commands import rollout, serve
from cluster.commands.keys import add_key
from cluster.config import AuthConfig, GrpcConfig, HttpConfig, NibbleConfig, default_config
from cluster.errors import ConfigError
from cluster.model_config import ROUTER_NAME, ReplicasConfig
from cluster.ray_cluster import free_ports
from deployments.routing.greeting import FirstAnswer


def config(host: str = "127.0.0.1", keys: Path | None = None) -> NibbleConfig:
    update = {"http": HttpConfig(host=host), "auth": AuthConfig(api_keys_file=keys)}
    return default_config().model_copy(update=update)


def warnings(config: NibbleConfig, joined: bool = False) -> list[str]:
    said: list[str] = []
    serve.check_access(config, joined, said.append)
    return said


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_on_loopback_nothing_is_warned_of(host: str) -> None:
    assert warnings(config(host)) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "some.host"])
def test_elsewhere_without_keys_there_is_one_line(host: str) -> None:
    (line,) = warnings(config(host))
    assert line.startswith(f"Warning: http.host is {host} and auth.api_keys_file is not set")
    assert "8000" in line
    assert "9000" in line


def test_in_a_joined_cluster_grpc_is_reached_from_elsewhere() -> None:
    (line,) = warnings(config(), joined=True)
    assert "port 9000" in line


def test_with_keys_nothing_is_warned_of(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.yaml", "alice", None, None)
    assert warnings(config("0.0.0.0", tmp_path / "keys.yaml")) == []


def test_a_keys_file_that_cannot_be_used_ends_it_at_once(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        warnings(config(keys=file))
    assert warnings(config(keys=file), joined=True) == []  # it may be on the router's node
    file.write_text("- 1\n")
    for joined in (False, True):
        with pytest.raises(ConfigError, match="entry 1"):
            warnings(config(keys=file), joined)
    file.write_text("[]\n")
    assert "every request will be refused" in warnings(config(keys=file))[0]


def test_addresses_of_ipv6_have_brackets() -> None:
    assert serve.addresses(config("::1")) == ("http://[::1]:8000", "[::1]:9000")
    assert serve.addresses(config()) == ("http://127.0.0.1:8000", "127.0.0.1:9000")


def greeting(config: NibbleConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """What is said, and the models that were asked."""
    asked: list[str] = []

    async def ask(deployment: str, method: str, model: str, *_: Any, **__: Any) -> FirstAnswer:
        assert (deployment, method) == (ROUTER_NAME, "first_answer")
        asked.append(model)
        if model == "gptneox":
            raise RayActorError
        return FirstAnswer(" An answer.", 0.5)

    monkeypatch.setattr(serve, "ask", ask)
    said: list[str] = []
    serve.greet(config, *serve.addresses(config), said.append)
    return "\n".join(said), asked


def test_without_keys_each_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    said, asked = greeting(config(), monkeypatch)
    assert asked == ["llama", "gptneox", "bloom", "starcoder"]
    assert "llama (first token after 0.50 s): Q: What is CPU? A: An answer.\n" in said
    assert "gptneox: no first answer: The actor" in said  # and the others are asked nevertheless
    assert "NIBBLE_API_KEY" not in said
    assert "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type" in said


def test_a_model_that_only_a_request_starts_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = config().models
    sleeping = first.model_copy(update={"replicas": ReplicasConfig(min=0)})
    said, asked = greeting(config().model_copy(update={"models": (sleeping, *others)}), monkeypatch)
    assert asked == ["gptneox", "bloom", "starcoder"]
    assert "llama: no first answer: its first request starts a replica" in said


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (FirstAnswer(skipped=True), ": no first answer, since others are served"),
        (FirstAnswer(" A", 1.0, skipped=True), " (first token after 1.00 s): Q: A… (ended for another request)"),
        (FirstAnswer(), ": its first answer is empty"),
    ],
)
def test_what_is_said_of_an_answer_that_is_not_whole(answer: FirstAnswer, line: str) -> None:
    assert serve.greeting_line(answer, "Q:") == line


def test_with_keys_the_lines_to_copy_carry_one_and_no_model_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, asked = greeting(config(keys=tmp_path / "keys.yaml"), monkeypatch)
    assert asked == []
    # In double quotes: the shell must put the key in.
    assert '/v1/completions -H "Authorization: Bearer $NIBBLE_API_KEY" -H' in said
    assert "NIBBLE_API_KEY=… nibble generate llama" in said
    assert "no first answers" in said


def test_a_model_that_takes_long_to_start_is_spoken_of_at_growing_intervals() -> None:
    said: list[str] = []
    lines = rollout.StateLines(said.append)
    for second in range(200):
        lines.show("llama", "1 starting", ready=False, now=1000 + second)
    assert said == ["llama: 1 starting", *(f"llama: 1 starting ({seconds} s)" for seconds in (15, 30, 60, 120, 180))]
    lines.show("llama", "1 running", ready=True, now=1200)
    lines.show("llama", "1 running", ready=True, now=1300)
    assert said[-1] == "llama: 1 running"


def test_a_port_in_use_is_told_in_one_line_before_anything_starts() -> None:
    free, other = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key, http, grpc in (("http.port", port, free), ("grpc.port", free, port)):
            update = {"http": HttpConfig(port=http), "grpc": GrpcConfig(port=grpc)}
            with pytest.raises(ConfigError, match=rf"^{key}: {port} on 127\.0\.0\.1 cannot be used") as refused:
                serve.check_ports(default_config().model_copy(update=update))
            assert "\n" not in str(refused.value)
    update = {"http": HttpConfig(port=free), "grpc": GrpcConfig(port=other)}
    serve.check_ports(default_config().model_copy(update=update))
    with pytest.raises(ConfigError, match=r"http\.host: '203\.0\.113\.999'"):
        serve.check_ports(config("203.0.113.999"))
