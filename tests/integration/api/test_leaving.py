"""Clients that leave, and requests whose time is over: the engine goes on for nobody, as its counters show."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import pytest

from cluster.ray_cluster import free_ports
from tests.integration.api.request_log import wait_logged
from tests.integration.counters import Ask, counters_of, until
from tests.integration.processes import Served, sandbox, serving

# One request at a time, and room in the context for far more than ten seconds of text.
CONFIG = """
limits: {timeout_s: 10, keep_alive_s: 0.3}
models:
- {name: one, family: llama, checkpoint: 'builtin:llama', threads: 1, context: 8000, queue: {max_ongoing: 1}}
- {name: two, family: llama, checkpoint: 'builtin:llama', threads: 1, context: 8000, queue: {max_ongoing: 2}}
"""
TOKENS = 7900
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with sandbox() as home, serving(home, CONFIG, *free_ports(2)) as served:
        yield served


@pytest.fixture(scope="module")
def counters(served: Served) -> Iterator[Ask]:
    with counters_of(served) as ask:
        yield ask


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "Q: What is CPU? A:", "max_tokens": TOKENS, "ignore_eos": True, **fields}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_connection_stops_the_engine(served: Served, counters: Ask, stream: bool) -> None:
    before = counters("two")
    id = f"leaves-{stream}"
    content = json.dumps(body("two", stream=stream)).encode()
    with closing(http.client.HTTPConnection(served.http.removeprefix("http://"), timeout=TIMEOUT_S)) as connection:
        # The body in a packet of its own, which is where HAProxy may fail to notice the end.
        connection.putrequest("POST", "/v1/completions")
        # The last one is Serve's own: obeyed, nobody would notice that the client has left.
        headers = {"Content-Length": str(len(content)), "X-Request-Id": id, "X-Request-Disconnect-Disabled": "?1"}
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        time.sleep(0.1)
        connection.send(content)
        if stream:
            answer = connection.getresponse()
            while not (line := answer.readline()).startswith(b"data: "):  # comments may come before it
                assert line, "the stream ended before its first token"
        else:
            until(counters, "two", lambda now: now["requests"] == before["requests"] + 1)
    after = until(counters, "two", lambda now: now["cancelled"] == before["cancelled"] + 1)
    assert after["generated_tokens"] - before["generated_tokens"] < TOKENS
    assert wait_logged(served, id)["status"] == 499
    assert counters("two")["generated_tokens"] == after["generated_tokens"]


def test_a_request_whose_time_is_over_ends_with_504_and_stops_the_engine(served: Served, counters: Ask) -> None:
    before = counters("two")
    answer = httpx.post(f"{served.http}/v1/completions", json=body("two"), timeout=TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "longer than the 10 s" in answer.json()["error"]["message"]
    after = until(counters, "two", lambda now: now["cancelled"] == before["cancelled"] + 1)
    assert 0 < after["generated_tokens"] - before["generated_tokens"] < TOKENS


def test_a_queued_request_hears_comments_and_is_never_generated_when_its_client_leaves(
    served: Served, counters: Ask
) -> None:
    before = counters("one")
    url = f"{served.http}/v1/completions"

    running = threading.Event()

    def occupy() -> list[str]:
        with httpx.stream("POST", url, json=body("one", stream=True), timeout=TIMEOUT_S) as response:
            lines = []
            for line in response.iter_lines():
                if line.startswith("data: "):  # a comment does not say that it runs
                    running.set()
                lines.append(line)
        return [line for line in lines if line]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(occupy)
        assert running.wait(TIMEOUT_S)
        # The first one holds the replica's only place, so that this one waits.
        headers = {"X-Request-Id": "queued"}
        with httpx.stream("POST", url, json=body("one", stream=True), headers=headers, timeout=TIMEOUT_S) as response:
            assert next(response.iter_lines()) == ": keep-alive"
        lines = first.result()
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert lines[-1] == "data: [DONE]"
    left = wait_logged(served, "queued")
    assert (left["status"], left["completion_tokens"]) == (499, 0)
    answer = httpx.post(url, json=body("one", max_tokens=1), timeout=TIMEOUT_S)
    assert answer.status_code == 200
    after = counters("one")
    # The one that ran out of time and the last one: none in between.
    assert after["requests"] == before["requests"] + 2
    assert after["cancelled"] == before["cancelled"] + 1
