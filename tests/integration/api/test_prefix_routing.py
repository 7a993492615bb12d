"""Two replicas: the next turn of a conversation, and of a session, goes to the one that has its prompt cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cluster.ray_cluster import free_ports
from tests.integration.observability.test_metrics import scraped
from tests.integration.processes import Served, sandbox, serving

pytest.importorskip("openvino", reason="the extra openvino is not installed")

CONFIG = """
models:
- {name: llama, family: llama, checkpoint: 'builtin:llama', engine: openvino, threads: 1, replicas: {min: 2, max: 2}}
"""
TURNS = 6  # that chance would all send to the right one of two replicas once in 64 times


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with sandbox() as home, serving(home, CONFIG, *free_ports(2)) as served:
        yield served


def requests_of(served: Served) -> dict[str, float]:
    """By replica, so far."""
    return {
        dict(labels)["replica"]: value
        for (name, labels), value in scraped(served, replicas=2).items()
        if name == "nibble_replica_requests_total"
    }


def replica_for(served: Served, messages: list[dict[str, str]], **headers: str) -> tuple[str, dict[str, Any]]:
    """Which one answered, and the answer."""
    before = requests_of(served)
    body = {"model": "llama", "messages": messages, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    response = httpx.post(f"{served.http}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    (replica,) = [id for id, count in requests_of(served).items() if count > before.get(id, 0)]
    return replica, response.json()


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_the_next_turn_goes_to_the_replica_of_the_one_before_and_finds_its_prompt_there(served: Served) -> None:
    assert len(requests_of(served)) == 2
    conversations = []
    for number in range(TURNS):
        messages = [{"role": "user", "content": f"{number} is a number. " + "What is a CPU and what is RAM? " * 12}]
        replica, answer = replica_for(served, messages)
        assert cached(answer) < answer["usage"]["prompt_tokens"] / 4
        conversations.append(([*messages, answer["choices"][0]["message"]], replica))
    for messages, replica in conversations:
        turn = [{"role": each["role"], "content": each["content"]} for each in messages]
        again, answer = replica_for(served, [*turn, {"role": "user", "content": "And what is a disk?"}])
        assert again == replica
        assert cached(answer) > answer["usage"]["prompt_tokens"] / 2


def test_a_session_stays_with_its_replica_though_another_one_has_the_prompt(served: Served) -> None:
    session = {"x-session-id": "one"}
    home, _ = replica_for(served, [{"role": "user", "content": "Hi."}], **session)
    for number in range(20):
        elsewhere = [{"role": "user", "content": f"Not {number}: " + "What is Python and what is Ray? " * 10}]
        replica, _ = replica_for(served, elsewhere)
        if replica != home:
            break
    else:
        pytest.fail("twenty prompts went to the replica of the session")
    assert replica_for(served, elsewhere)[0] != home
    assert replica_for(served, elsewhere, **session)[0] == home
