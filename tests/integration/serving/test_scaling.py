"""A model that scales from zero, on a real server: what wakes it, how many replicas it gets, and that it goes back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.ray_cluster import free_ports
from tests.chaos.load import Client, Load, Protocol
from tests.integration.processes import Served, assert_ends_cleanly, replicas, sandbox, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CONFIG = """
models:
- name: m
  family: llama
  checkpoint: builtin:llama
  threads: 1
  replicas:
    {min: 0, max: 3, target_ongoing_requests: 1, downscale_delay_s: 5, downscale_to_zero_delay_s: 30}
  queue: {max_ongoing: 2}
"""
TOKENS = 200
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")
PAGES = ("/healthz", "/readyz", "/v1/models", "/v1/models/m", "/metrics", "/v2/health/ready", "/v2/models/m/ready")
# Longer than Serve counts a request that has ended (`LEAST_TO_ZERO_S` of cluster/model_config.py): nothing later is
# woken by it.
SETTLED_S = 30


@pytest.fixture
def served() -> Iterator[Served]:
    http_port, grpc_port = free_ports(2)
    with sandbox() as home, serving(home, CONFIG, http_port, grpc_port) as server:
        yield server
        assert_ends_cleanly(server, 2)


def running(served: Served) -> int:
    return len(replicas(served.sandbox, "m"))


def decisions(served: Served) -> list[tuple[int, int]]:
    """Of Serve's controller, by its log: from how many replicas to how many."""
    (log,) = {file.resolve() for file in served.sandbox.ray_tmpdir.rglob("serve/controller_*.log")}
    found = re.findall(r"(?:Up|Down)scaling Deployment\(name='m'.*?from (\d+) to (\d+) replicas", log.read_text())
    return [(int(before), int(after)) for before, after in found]


async def until(condition: Callable[[], bool]) -> None:
    """For the test's own time, at most."""
    while not condition():
        await asyncio.sleep(0.2)


async def look(served: Served) -> None:
    """What a page, Prometheus and health checks ask for. All find the model ready."""
    async with httpx.AsyncClient(base_url=served.http, trust_env=False, timeout=30) as client:
        for path in PAGES:
            response = await client.get(path)
            assert response.status_code == 200, (path, response.text)
    async with grpc.aio.insecure_channel(served.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def looking(served: Served) -> AsyncIterator[None]:
    async def again() -> None:
        while True:
            await look(served)
            await asyncio.sleep(1)

    task = asyncio.create_task(again())
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def asleep(served: Served) -> int:
    """How many decisions there were, at zero, after a while in which nothing but looks came."""
    await until(lambda: running(served) == 0)
    before = decisions(served)
    await asyncio.sleep(SETTLED_S)
    assert decisions(served) == before, "it woke without a request"
    assert running(served) == 0
    return len(before)


def clients(served: Served, count: int) -> list[Client]:
    return [Client(served.http, served.grpc, "m", PROTOCOLS[number % 2], TOKENS) for number in range(count)]


def ups_then_downs(changes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """By how many each time."""
    steps = [after - before for before, after in changes]
    ups = [step for step in steps if step > 0]
    assert steps[: len(ups)] == ups, f"more replicas, and then only fewer: {changes}"
    return ups, steps[len(ups) :]


async def test_a_model_goes_from_zero_to_what_its_load_needs_and_back(served: Served) -> None:
    assert "its first request starts a replica" in served.output
    async with looking(served):
        await asyncio.sleep(5)
        assert (running(served), decisions(served)) == (0, [])
        status = await asyncio.to_thread(served.sandbox.run, "status")
        assert "idle; its next request" in status.stdout, status.stdout + status.stderr

        burst = await asyncio.gather(*(client.ask(None) for client in clients(served, 6)))
        assert {outcome.kind for outcome in burst} == {"right"}, burst
        end = await asleep(served)
        ups, downs = ups_then_downs(decisions(served)[:end])
        assert (sum(ups), sum(downs)) == (3, -3), "as many as hold all of it, before a rate is known"

        load = Load(clients(served, 8))
        async with load.running():  # its first request is alone, and the rest come when it is answered
            await until(lambda: running(served) == 3)
        print(load.counts["m"], decisions(served))
        assert (load.counts["m"].bad, load.counts["m"].sent > 8) == (0, True), load.counts["m"]
        last = await asleep(served)
        ups, downs = ups_then_downs(decisions(served)[end:last])
        assert (ups[0], sum(ups), sum(downs)) == (1, 3, -3)
