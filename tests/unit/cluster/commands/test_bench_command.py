"""`nibble bench` whole, on servers of this process: tables, JSON, plots, errors, Ctrl-C."""

from __future__ import annotations

import importlib
import json
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.bench import plot, results
from cluster.bench.load_records import Load
from cluster.cli import app
from cluster.commands.bench import COMPARE_KEY_VARIABLE, loads_of
from cluster.errors import ConfigError, NibbleError
from cluster.ray_cluster import free_ports
from deployments.client import API_KEY_VARIABLE
from tests.unit.sse_server import Body, SseServer, completion, refusal

SMALL = ["--input-tokens", "8", "--output-tokens", "4", "--requests", "4", "--rounds", "2", "--warmup", "1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "m", *SMALL, *arguments])


def test_a_table_a_level_with_every_figure() -> None:
    with SseServer() as server:
        result = run("--url", server.url, "--concurrency", "1,2", "--rate", "50")
    assert result.exit_code == 0
    for words in ("Concurrency 1", "Concurrency 2", "50 requests/s", f"A: m at {server.url}", "no errors"):
        assert words in result.output
    for label in ("output tokens/s", "requests/s", "TTFT, p50 ms", "TPOT, p95 ms", "gap, p99 ms", "latency, p99 ms"):
        assert result.output.count(f"│ {label}") == 3
    assert "output tokens counted by usage" in result.output
    assert len(server.bodies) == 1 + 3 * 2 * 4
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {8}


def test_two_servers_are_compared_and_everything_is_in_the_json(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with SseServer() as ours, SseServer(pause_s=0.02) as theirs:
        urls = ["--url", ours.url, "--compare", theirs.url, "--compare-model", "other"]
        result = run(*urls, "--concurrency", "2", "--json", str(file), "--raw", "--seed", "5")
    assert result.exit_code == 0
    assert "A/B" in result.output
    assert {body["model"] for body in theirs.bodies} == {"other"}
    found = json.loads(file.read_text())
    assert found["settings"]["seed"] == 5
    assert found["settings"]["baseline"] == 1
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["versions"]["python"]
    (level,) = found["levels"]
    assert level["load"] == {"kind": "concurrency", "value": 2.0}
    first, second = level["servers"]
    assert second["ratios"] is None
    assert first["ratios"]["output_tokens"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert first["ratios"]["ttft_p50_s"]["median"] > 0
    assert first["tokens_counted_by"] == "usage"
    for number, round in enumerate(first["rounds"]):
        assert (round["round"], round["requests_sent"], round["requests_succeeded"]) == (number, 4, 4)
        assert (round["ending"], round["errors"]) == ("whole", {})
        assert round["figures"]["output_tokens"] == 4.0
        assert round["figures"]["ttft_p50_s"] <= round["figures"]["latency_p50_s"]
        for request in round["requests"]:
            assert request["output_tokens"] == len(request["reply"]["chunks"]) == 4
            assert request["due"] <= request["sent"] <= request["reply"]["chunks"][0] <= request["reply"]["end"]


def test_without_raw_the_json_has_no_requests(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with SseServer() as server:
        run("--url", server.url, "--concurrency", "1", "--json", str(file))
    assert "requests" not in json.loads(file.read_text())["levels"][0]["servers"][0]["rounds"][0]


@pytest.fixture(scope="module")
def fonts() -> None:
    """In a new home, matplotlib starts fc-list the first time; here, before a test may start no process."""
    importlib.import_module("matplotlib.font_manager")


@pytest.mark.usefixtures("fonts")
def test_plots_are_png_and_svg(tmp_path: Path) -> None:
    png, svg = tmp_path / "out.png", tmp_path / "out.svg"
    with SseServer() as server:
        urls = ["--url", server.url, "--url", f"{server.url}/v1"]
        run(*urls, "--concurrency", "1,2", "--rate", "50", "--plot", str(png), "--plot", str(svg))
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") > 1000
    assert png.stat().st_size > 20_000
    root = ET.parse(svg).getroot()
    assert root.tag.endswith("svg")
    # Text is drawn; matplotlib notes it in comments beside.
    text = svg.read_text()
    words = ("Throughput", "output tokens/s", "concurrent requests", "requests sent a second", f"A: m at {server.url}")
    for each in (*words, f"B: m at {server.url}/v1"):
        assert f"<!-- {each} -->" in text


def test_errors_are_counted_by_status_and_message(tmp_path: Path) -> None:
    def sometimes(body: Body) -> Any:
        # Requests 3, 6 and 9, of which the first is the warm-up's.
        return refusal(429, "queue full") if len(server.bodies) % 3 == 0 else completion(body)

    file = tmp_path / "out.json"
    with SseServer(sometimes) as server:
        result = run("--url", server.url, "--concurrency", "1", "--json", str(file))
    assert result.exit_code == 0
    assert "3 of 8 requests failed" in result.output
    assert "3 x HTTP 429: queue full" in result.output
    assert json.loads(file.read_text())["levels"][0]["servers"][0]["errors"] == {"HTTP 429: queue full": 3}


def test_a_server_that_knows_neither_option_is_measured_by_its_chunks_and_it_is_said() -> None:
    def plain(body: Body) -> Any:
        for name in ("ignore_eos", "stream_options"):
            if name in body:
                return refusal(400, f"{name}: unknown")
        return completion(body | {"max_tokens": 2})

    with SseServer(plain) as server:
        result = run("--url", server.url, "--concurrency", "1", "--text-prompts")
    assert result.exit_code == 0
    assert "A takes no ignore_eos" in result.output
    assert "output tokens counted by chunks" in result.output
    assert "completions are shorter than the 4 tokens asked for" in result.output
    assert all(isinstance(body["prompt"], str) for body in server.bodies)


def test_a_file_s_lines_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    with SseServer() as server:
        assert run("--url", server.url, "--concurrency", "1", "--prompt-file", str(file)).exit_code == 0
    assert sorted(body["prompt"] for body in server.bodies[:2]) == ["one", "two"]


def test_keys_are_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "ours")
    with SseServer() as first, SseServer() as second:
        arguments = ["--url", first.url, "--compare", second.url, "--concurrency", "1"]
        run(*arguments)
        assert first.headers[-1]["Authorization"] == second.headers[-1]["Authorization"] == "Bearer ours"
        monkeypatch.setenv(COMPARE_KEY_VARIABLE, "theirs")
        run(*arguments)
        assert first.headers[-1]["Authorization"] == "Bearer ours"
        assert second.headers[-1]["Authorization"] == "Bearer theirs"


def test_a_scheme_need_not_be_given_for_grpc_and_decides_the_protocol() -> None:
    (port,) = free_ports(1)
    for arguments in (["--grpc", "--url", f"127.0.0.1:{port}"], ["--url", f"grpc://127.0.0.1:{port}"]):
        error = run(*arguments).exception
        assert isinstance(error, NibbleError)
        assert str(error).startswith(f"grpc://127.0.0.1:{port}: gRPC UNAVAILABLE: ")
    error = run("--grpc", "--url", f"http://127.0.0.1:{port}").exception
    assert str(error).startswith(f"http://127.0.0.1:{port}: connection: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "1,x"], "concurrency: found '1,x', allowed are whole numbers from 1"),
        (["--concurrency", "0"], "concurrency: found '0'"),
        (["--concurrency", "1.5"], "concurrency: found '1.5'"),
        (["--concurrency", ""], "concurrency: found ''"),
        (["--rate", "-1"], "rate: found '-1', allowed are numbers above 0"),
        (["--rate", "nan"], "rate: found 'nan'"),
        (["--rate", "inf"], "rate: found 'inf'"),
        (["--url", "ftp://x"], "url: found 'ftp://x', allowed are http://HOST:PORT"),
        (["--compare-model", "x"], "compare-model: found without --compare"),
        (["--raw"], "raw: found without --json"),
        (["--text-prompts", "--prompt-file", "x"], "text-prompts: found together with --prompt-file"),
        (["--json", "/no/such/folder/x.json"], "json: /no/such/folder/x.json cannot be written"),
        (["--plot", "/no/such/folder/x.png"], "plot: /no/such/folder/x.png cannot be written"),
        (["--plot", "x.pdf"], "plot: found 'x.pdf', allowed are names that end in .png or .svg"),
    ],
)
def test_what_is_not_right_is_said_before_anything_is_sent(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'nibble-serve\[bench\]'"):
        plot.check_plot(tmp_path / "x.png")


def test_loads() -> None:
    assert loads_of(None, None) == tuple(Load("concurrency", value) for value in (1, 4, 8, 16))
    assert loads_of(None, "2,0.5,2") == (Load("rate", 2), Load("rate", 0.5))
    assert loads_of("3", "3") == (Load("concurrency", 3), Load("rate", 3))


def test_the_cpu_s_name_is_read() -> None:
    assert results.cpu_model("processor\t: 0\nmodel name\t: Some CPU: v2\nmodel name\t: Other\n") == "Some CPU: v2"
    assert results.cpu_model("") == "unknown"
