"""A running cluster with API keys and limits; and a fuzzer that reads its OpenAPI document."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from deployments.api.access import LOOK_S
from deployments.client import NibbleClient
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.examples import examples
from tests.integration.api.request_log import router_logs, wait_logged
from tests.integration.guarded_server import serving_with_key
from tests.integration.processes import Served

FUZZER_S = 1200
CONFIG = """
auth: {api_keys_file: KEYS}
limits: {max_tokens: 8, choices: 4, prompt_tokens: 100, body_bytes: 65536, timeout_s: 60}
models:
- {name: bloom, family: bloom, checkpoint: 'builtin:bloom', threads: 1, queue: {max_queued: 512}}
- {name: llama, family: llama, checkpoint: 'builtin:llama', threads: 1}
"""
FUZZED_REQUESTS = examples(400, 2000)
# All that tell of a fault of the server's. Left out: positive_data_acceptance, since no schema can say what a model's
# context holds or which ids are in its vocabulary, which are refused with 400.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection"
)


class Guarded:
    def __init__(self, served: Served, keys: Path, key: str) -> None:
        self.served, self.keys, self.key = served, keys, key

    def post(self, key: str | None, **fields: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"model": "bloom", "prompt": "Q: What is CPU? A:", "max_tokens": 4, **fields}
        return httpx.post(f"{self.served.http}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with serving_with_key(CONFIG) as (served, keys, key):
        yield Guarded(served, keys, key)


def test_serve_says_how_to_send_a_key(guarded: Guarded) -> None:
    assert "Authorization: Bearer $NIBBLE_API_KEY" in guarded.served.output
    assert guarded.key not in guarded.served.output


def test_only_a_key_opens_the_door_over_http_and_grpc(guarded: Guarded, served: Served) -> None:
    # While a cluster without keys runs beside this one.
    assert httpx.get(f"{served.http}/readyz", timeout=60).status_code == 200
    assert guarded.post(guarded.key).status_code == 200
    for wrong in (None, "nbl-wrong", guarded.key[:-1]):
        refused = guarded.post(wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    request = pb.GenerateRequest(model="bloom", prompt="Q:", max_tokens=4)
    with grpc.insecure_channel(guarded.served.grpc) as channel:
        stub = InferenceStub(channel)
        assert stub.Generate(request, timeout=60, metadata=[("authorization", f"Bearer {guarded.key}")]).choices
        for metadata in ([], [("authorization", "Bearer nbl-wrong")]):
            for call in (stub.Generate, lambda *a, **k: list(stub.GenerateStream(*a, **k))):
                with pytest.raises(grpc.RpcError) as error:
                    call(request, timeout=60, metadata=metadata)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_key_added_to_the_file_works_without_a_restart_and_its_limits_hold(guarded: Guarded) -> None:
    home = guarded.served.sandbox
    limits = ("--max-concurrent", "1", "--tokens-per-minute", "60")
    key = home.run("keys", "add", str(guarded.keys), "bob", *limits).stdout.strip()
    time.sleep(LOOK_S)  # by then the router looks at the file when it is asked
    assert guarded.post(key).status_code == 200
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: guarded.post(key, max_tokens=8, ignore_eos=True), range(16)))
    assert {answer.status_code for answer in answers} <= {200, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
    assert guarded.post(guarded.key).status_code == 200  # one key's limits are not another's
    assert home.run("keys", "remove", str(guarded.keys), "bob").returncode == 0
    time.sleep(LOOK_S)
    assert guarded.post(key).status_code == 401


def test_the_operator_s_limits(guarded: Guarded) -> None:
    for fields, param in (({"max_tokens": 9}, "max_tokens"), ({"n": 5}, "n"), ({"prompt": "CPU " * 101}, "prompt")):
        refused = guarded.post(guarded.key, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert guarded.post(guarded.key, prompt="x" * 70_000).status_code == 413
    with NibbleClient(guarded.served.http, api_key=guarded.key) as client:
        assert client.chat("bloom", [{"role": "user", "content": "hi"}], ignore_eos=True).usage.completion_tokens == 8


def test_each_request_has_one_id_and_one_log_line_without_its_text(guarded: Guarded) -> None:
    headers = {"Authorization": f"Bearer {guarded.key}", "X-Request-Id": "from-the-test"}
    body = {"model": "bloom", "prompt": "a secret prompt", "max_tokens": 4}
    answer = httpx.post(f"{guarded.served.http}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["from-the-test"]
    record = wait_logged(guarded.served, "from-the-test")
    assert (record["status"], record["key"], record["model"]) == (200, "alice", "bloom")
    assert record["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert not any("secret prompt" in text or guarded.key in text for text in router_logs(guarded.served))


@pytest.mark.generated
@pytest.mark.timeout(FUZZER_S + 60)
def test_a_fuzzer_finds_no_server_error_and_no_violation_of_the_schema(guarded: Guarded, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{guarded.served.http}/openapi.json",
        "--mode", "all", "--phases", "coverage,fuzzing", "--checks", CHECKS, "--seed", "7",
        "--max-examples", str(examples(20, 180)),
        "--header", f"Authorization: Bearer {guarded.key}", "--suppress-health-check", "all", "--no-color",
        "--continue-on-failure", "--request-timeout", "60",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=FUZZER_S, check=False, cwd=tmp_path)
    report = result.stdout[-6000:]
    assert result.returncode == 0, report
    generated = re.search(r"(\d+) generated", report)
    assert generated is not None, report
    assert int(generated[1]) >= FUZZED_REQUESTS, report
