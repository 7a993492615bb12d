"""The command line against a running cluster, and `nibble pipeline` and `nibble convert` on their own."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from cluster.artifacts.manifest import Manifest
from cluster.checkpoints.sources import builtin_checkpoint
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from tests.integration.processes import Sandbox, Served, sandbox
from tests.random_checkpoint import OPENVINO_SHAPES, write_lively_weights, write_random_checkpoint

TIMINGS = r"""bigdl-llm timings:        load time = +[\d.]+ ms
bigdl-llm timings:      sample time = +[\d.]+ ms / +\d+ runs   \( +[\d.]+ ms per token\)
bigdl-llm timings: prompt eval time = +[\d.]+ ms / +\d+ tokens \( +[\d.]+ ms per token\)
bigdl-llm timings:        eval time = +[\d.]+ ms / +\d+ runs   \( +[\d.]+ ms per token\)
bigdl-llm timings:       total time = +[\d.]+ ms"""
HEADINGS = ("HuggingFace transformers tokenizer", "bigdl-llm based tokenizer", "fast forward")
DIGESTS = json.loads((Path(__file__).parents[2] / "reference" / "digests.json").read_text())


def test_serve_greets_with_lines_to_copy_and_a_first_answer_of_each_family(served: Served) -> None:
    output = served.output
    assert f"HTTP {served.http}  gRPC {served.grpc}" in output
    assert f"curl {served.http}/v1/completions" in output
    assert f"nibble generate llama 'Q: What is CPU? A:' --grpc --url {served.grpc} --stream" in output
    for family in FAMILY_NAMES:
        answer = rf"^{family} \(first token after [\d.]+ s\): {re.escape(FAMILIES[family].demo_prompt)}\s+\w+"
        assert re.search(answer, output, re.MULTILINE)
    assert "share the cores evenly" in output


def test_generate_over_http_and_grpc_streamed_or_not(served: Served) -> None:
    arguments = ("generate", "llama", "Q: What is CPU? A:", "--max-tokens", "40")
    answers = {
        served.sandbox.run(*arguments, *how).stdout
        for how in (
            ("--url", served.http),
            ("--url", served.http, "--stream"),
            ("--grpc", "--url", served.grpc),
            ("--grpc", "--url", served.grpc, "--stream"),
        )
    }
    assert len(answers) == 1
    assert "CPU" in answers.pop()


def test_generate_tells_the_server_s_error(served: Served) -> None:
    for how, words in (
        (("--url", served.http), "HTTP 404: model"),
        (("--grpc", "--url", served.grpc), "gRPC NOT_FOUND: model"),
    ):
        result = served.sandbox.run("generate", "gpt-5", "a", *how)
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_models_lists_what_is_served(served: Served) -> None:
    result = served.sandbox.run("models", "--url", served.http)
    assert result.returncode == 0
    assert all(family in result.stdout for family in FAMILY_NAMES)


@pytest.mark.parametrize("optimized", ["0", "1"])
def test_status_shows_nodes_replicas_and_artifacts(served: Served, optimized: str) -> None:
    home = served.sandbox
    result = Sandbox(home.home, home.ray_tmpdir, {"RAY_SERVE_THROUGHPUT_OPTIMIZED": optimized}).run("status")
    assert result.returncode == 0, result.stderr
    assert re.search(r"avx512|avx2|avxvnni|amx|avx", result.stdout)
    for family in FAMILY_NAMES:
        assert re.search(rf"{family} +│ 1 running +│ bigdl", result.stdout)
        assert f"builtin:{family}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "llama", "a", "--url", "http://127.0.0.1:9"), "is `nibble serve` running there?"),
        (("models", "--url", "http://127.0.0.1:9"), "is `nibble serve` running there?"),
        (("status",), "no `nibble serve` runs on this machine"),
        (("pipeline", "--model-family", "gpt2"), "family: found 'gpt2', allowed are llama, gptneox, bloom, starcoder"),
        (("pipeline", "--thread-num", "0"), "thread-num: found 0"),
        (("pipeline", "--thread-num", "4096"), "thread-num: found 4096, this machine allows 1.."),
        (("serve", "missing.yaml"), "missing.yaml: cannot be read"),
        (("convert", "builtin:llama", "--family", "llama", "--output", "cluster"), "not an empty folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(arguments: tuple[str, ...], words: str) -> None:
    with sandbox() as home:
        result = home.run(*arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pipeline_converts_loads_and_infers_three_ways(family: FamilyName) -> None:
    prompt = FAMILIES[family].demo_prompt
    with sandbox() as home:
        result = home.run(
            "pipeline", "--thread", "1", "--model-family", family, "--repo-id-or-model-path", f"builtin:{family}",
            "--promp", prompt,
        )  # fmt: skip
        assert home.wait_no_processes() == []
        assert list(home.ray_tmpdir.iterdir()) == []  # where a Ray node would have been
    assert result.returncode == 0, result.stderr
    sections = re.split(r"^-+ (.+) -+$", result.stdout, flags=re.MULTILINE)[1:]
    assert tuple(sections[::2]) == HEADINGS
    form = r"(.*?)Inference time: [\d.]+ s\nOutput:\n(.+)"
    bodies = [match for body in sections[1::2] if (match := re.fullmatch(form, body.strip(), re.DOTALL))]
    (hugging_face,), (library,), completion = (ast.literal_eval(body[2]) for body in bodies)
    assert [body[1] for body in bodies[:2]] == ["", ""]
    assert re.fullmatch(TIMINGS, bodies[2][1].strip())
    assert set(completion) == {"id", "object", "created", "model", "choices", "usage"}
    assert re.search(rf"/artifacts/[0-9a-f]+/bigdl_llm_{family}_q4_0\.bin$", completion["model"])
    (choice,) = completion["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert choice["finish_reason"] in ("stop", "length")
    assert completion["usage"]["completion_tokens"] > 1
    text = choice["text"].strip()
    assert text
    assert not text.startswith(prompt)
    assert (hugging_face.strip(), library.strip()) == (text, text)


@pytest.mark.parametrize("family", ["bloom"])
def test_convert_writes_the_artifact_that_llm_convert_would(family: FamilyName, tmp_path: Path) -> None:
    output = tmp_path / "int4"
    with sandbox() as home:
        result = home.run("convert", str(builtin_checkpoint(family)), "--family", family, "--output", str(output))
        assert result.returncode == 0, result.stderr
    manifest = Manifest.read(output)
    binary = (output / f"bigdl_llm_{family}_q4_0.bin").read_bytes()
    assert hashlib.sha256(binary).hexdigest() == manifest.sha256 == DIGESTS[f"builtin:{family}"]["sha256"]
    assert {"config.json", "tokenizer.json", "manifest.json"} <= {path.name for path in output.iterdir()}
    assert "converted" in result.stdout
    for entry in manifest.tensors:
        assert entry.offset + entry.bytes <= len(binary)


def test_a_refused_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(builtin_checkpoint("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 48}))
    output = tmp_path / "int4"
    with sandbox() as home:
        result = home.run("convert", str(folder), "--family", "llama", "--output", str(output))
        cache = home.home / ".cache" / "nibble" / "artifacts"
        assert not cache.exists() or [path for path in cache.iterdir() if path.is_dir()] == []
    assert result.returncode == 1
    assert "head_dim: found 48, allowed is 16" in result.stderr
    assert not output.exists()


def test_what_openvino_alone_runs_is_converted_and_says_so_and_pipeline_refuses_it(tmp_path: Path) -> None:
    """Pipeline's engine is bigdl; also when the artifact is in the node cache already."""
    folder = write_random_checkpoint(tmp_path / "model", OPENVINO_SHAPES["llama3"], write=write_lively_weights)
    output = tmp_path / "int4"
    with sandbox() as home:
        converted = home.run("convert", str(folder), "--family", "llama", "--output", str(output))
        refused = home.run("pipeline", "--repo-id-or-model-path", str(folder), "--thread-num", "1")
    assert converted.returncode == 0, converted.stderr
    assert "for engine openvino" in converted.stdout
    assert Manifest.read(output).engines == ("openvino",)
    assert refused.returncode == 1
    assert refused.stderr.strip().endswith(
        f"{folder}/config.json: rope_theta: found 500000.0, allowed is 10000.0: the runtime fixes it; engine openvino"
        " runs it"
    )
