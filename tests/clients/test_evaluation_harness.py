"""lm-evaluation-harness: generation with nine stop strings and log likelihoods over completions, generation over chats.
Its tasks are files beside their data, so that it asks no Hub. Its tokenizer is the server's own, at `/tokenize`, where
it names no model: the server has one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.ray_cluster import free_ports
from tests.clients.tool_environment import python_tool, run_client
from tests.integration.processes import Served, sandbox, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # the first run installs it

QUESTIONS = ["Q: What is CPU? A:", "Q: What is RAM? A:"]
ANSWERS = [" The CPU is the central processing unit.", " zebra zebra zebra"]
STOPS = ["\n\n", "Q:", "</s>", "<|im_end|>", "###", "Question:", "\nclass", "\ndef", "\nif"]
BOS = 1  # of the demo
GENERATION = {"until": STOPS, "max_gen_toks": 24, "do_sample": False, "temperature": 0}
TASKS: dict[str, dict[str, Any]] = {
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": GENERATION,
        "metric_list": [{"metric": "exact_match"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ANSWERS,
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
Evaluate = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def single() -> Iterator[Served]:
    """A server of one model."""
    ports = free_ports(2)
    with (
        sandbox() as home,
        serving(home, "models: [{name: llama, family: llama, checkpoint: 'builtin:llama'}]", *ports) as served,
    ):
        yield served


@pytest.fixture
def evaluate(single: Served, tmp_path: Path) -> Evaluate:
    """Called with a kind of model, its path and tasks, gives the samples of each task."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": each, "answer": "CPU"}) + "\n" for each in QUESTIONS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"nibble_{name}", **source, **task}))

    def run(kind: str, path: str, tasks: tuple[str, ...], *options: str) -> dict[str, list[dict[str, Any]]]:
        asked = f"model=llama,base_url={single.http}{path},max_length=512,max_retries=1"
        command = [python_tool("lm_eval") / "lm_eval", "run", "--model", kind, "--model_args", asked, *options]
        command += ["--tasks", ",".join(f"nibble_{name}" for name in tasks), "--include_path", str(tmp_path)]
        run_client([*command, "--output_path", "out", "--log_samples"], tmp_path, OPENAI_API_KEY="any")
        samples = {name: next(tmp_path.glob(f"out/**/samples_nibble_{name}_*.jsonl")) for name in tasks}
        return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in samples.items()}

    return run


def post(served: Served, path: str, **body: Any) -> Any:
    response = httpx.post(f"{served.http}{path}", json={"model": "llama", **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(served: Served, text: str) -> list[int]:
    found: list[int] = post(served, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    return found


def test_completions_by_generation_and_log_likelihood(single: Served, evaluate: Evaluate) -> None:
    samples = evaluate("local-completions", "/v1/completions", ("generation", "choice", "rolling"))
    greedy = {"max_tokens": 24, "temperature": 0, "stop": STOPS}
    for sample, question in zip(samples["generation"], QUESTIONS, strict=True):
        text = post(single, "/v1/completions", prompt=tokens(single, question), **greedy)["choices"][0]["text"]
        assert sample["resps"] == [[text]]
        assert text.strip()
    for sample, question in zip(samples["choice"], QUESTIONS, strict=True):
        context = tokens(single, question)
        for [[logprob, _]], answer in zip(sample["resps"], ANSWERS, strict=True):
            text = tokens(single, question + answer)[len(context) :]
            assert float(logprob) == pytest.approx(log_likelihood(single, context, text), abs=1e-3)
        assert sample["acc"] == 1
    for sample, question in zip(samples["rolling"], QUESTIONS, strict=True):
        ((logprob,),) = sample["resps"]
        assert float(logprob) == pytest.approx(log_likelihood(single, [BOS], tokens(single, question)), abs=1e-3)


def log_likelihood(served: Served, context: list[int], text: list[int]) -> float:
    """Of a text behind a context, by the server's own answer."""
    asked = {"prompt": [*context, *text], "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = post(served, "/v1/completions", **asked)["choices"]
    return math.fsum(choice["logprobs"]["token_logprobs"][len(context) :])


def test_chats_by_generation(single: Served, evaluate: Evaluate) -> None:
    path = "/v1/chat/completions"
    samples = evaluate("local-chat-completions", path, ("generation",), "--apply_chat_template")
    for sample, question in zip(samples["generation"], QUESTIONS, strict=True):
        # It sends four of the stop strings, as OpenAI allows.
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "stop": STOPS[:4]}
        message = post(single, path, temperature=0, **asked)["choices"][0]["message"]
        assert sample["resps"] == [[message["content"]]]
        assert message["content"].strip()
