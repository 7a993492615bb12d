"""The counters of a running cluster's replicas, asked for by a process of its own that has joined the cluster."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.integration.processes import ROOT, Served

Ask = Callable[[str], dict[str, Any]]

POLLING_S = 60


@contextmanager
def counters_of(served: Served) -> Iterator[Ask]:
    """A function from a model's name to what one of its replicas says of itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.counters"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=served.sandbox.environment,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def ask(model: str) -> dict[str, Any]:
        for _ in range(6):
            print(model, file=requests, flush=True)
            answer: dict[str, Any] = json.loads(answers.readline())
            if answer:  # else the replica was too busy to answer within the router's time for it
                return answer
        raise AssertionError(f"{model}: no replica says anything")

    try:
        yield ask
    finally:
        requests.close()
        process.wait(30)
        answers.close()


def until(ask: Ask, model: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first counters of which it holds."""
    deadline = time.monotonic() + POLLING_S
    while not holds(found := ask(model)):
        assert time.monotonic() < deadline, f"{model}: still {found} after {POLLING_S} s"
    return found


async def answer() -> None:
    """A line of JSON for each line of the standard input, a model's name."""
    from cluster.commands.status import replica_info

    while model := (await asyncio.to_thread(sys.stdin.readline)).strip():
        print(json.dumps(await replica_info(model)), flush=True)


if __name__ == "__main__":
    from cluster.noted import noted_address

    address = noted_address()  # before Ray is imported
    from cluster.ray_cluster import joined_cluster

    with joined_cluster(address):
        asyncio.run(answer())
