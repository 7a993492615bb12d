"""The time that a token takes in the router's Python: chunks of a model that costs nothing, through the ASGI app.

    python -m tests.bench.router_path [--chunks 5000] [--rounds 9]

No socket, no Serve, no replica: measured is the path from a served model to an event of the stream. Microseconds
a chunk, the median of the rounds; the time to the first event is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator
from typing import Any

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.http.http_api import build_http_api
from deployments.api.operations import Operations
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel


class FreeModel(EchoModel):
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        count = request.max_tokens or 0
        for index in range(count):
            last = index == count - 1
            yield GenerationChunk(" token", (index,), "length" if last else None, 4, index + 1)


async def microseconds_a_chunk(api: Any, chunks: int) -> float:
    body = json.dumps({"model": "echo", "prompt": "a b c d", "max_tokens": chunks, "stream": True}).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    begun = 0.0
    sent = 0

    async def receive() -> dict[str, Any]:
        if sent:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal begun, sent
        sent += 1
        if sent == 2:
            begun = time.perf_counter()

    await api(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)
    assert sent > chunks
    return (time.perf_counter() - begun) / chunks * 1e6


async def measured(chunks: int, rounds: int) -> list[float]:
    operations = Operations(Router({"echo": FreeModel()}, LimitsConfig()), Calls(Access(AuthConfig()), LoggingConfig()))
    api = build_http_api(lambda: operations)
    await microseconds_a_chunk(api, chunks)  # warm
    return [await microseconds_a_chunk(api, chunks) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    found = asyncio.run(measured(given.chunks, given.rounds))
    print(f"{statistics.median(found):.1f} µs a chunk ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
