"""aiperf and guidellm with their default arguments; only the lengths are shorter, which the demo's context of 512
tokens asks for, and the requests few. They take the model's name as their tokenizer's, which is in the Hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.clients.tool_environment import python_tool, run_client
from tests.conftest import DEMOS
from tests.integration.processes import Served

pytestmark = [pytest.mark.installs, pytest.mark.timeout(1200)]

MODEL = "gptneox"
COMMIT = "0" * 40


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A client's home, whose Hub cache has the tokenizer of the model."""
    repository = tmp_path / "hf" / "hub" / f"models--{MODEL}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(DEMOS / MODEL, repository / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


@pytest.mark.parametrize("streaming", [(), ("--streaming", "--use-server-token-count")], ids=["whole", "streamed"])
def test_aiperf(served: Served, home: Path, streaming: tuple[str, ...]) -> None:
    asked = ["--model", MODEL, "--url", served.http, "--isl", "60", "--osl", "12", "--request-count", "4", *streaming]
    run_client([python_tool("aiperf") / "aiperf", "profile", *asked], home)
    (file,) = home.glob("artifacts/**/profile_export_aiperf.json")
    report = json.loads(file.read_text())
    assert report["request_count"]["avg"] == 4
    assert not report["error_summary"]
    assert report["output_sequence_length"]["avg"] > 0  # of the text, which its tokenizer may cut in another way
    if streaming:
        assert report["output_sequence_length"]["avg"] <= 12
        assert report["time_to_first_token"]["count"] == 4
        assert report["total_usage_completion_tokens"]["avg"] > 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_guidellm(served: Served, home: Path, path: str) -> None:
    backend = f"kind=openai_http,target={served.http},model={MODEL},request_format={path}"
    asked = ["--backend", backend, "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"]
    asked += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8", "--output", "kind=json,path=found.json"]
    run_client([python_tool("guidellm") / "guidellm", "run", *asked, "--disable-console"], home)
    (benchmark,) = json.loads((home / "found.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {"successful": 3, "errored": 0, "incomplete": 0, "total": 3}
    # It asks for eight with `ignore_eos`, and counts them by `continuous_usage_stats`.
    assert metrics["output_token_count"]["successful"]["mean"] == 8
    assert metrics["time_to_first_token_ms"]["successful"]["count"] == 3
