"""Faults put into a running server, under load: what is lost is at most what had begun where the fault was, its client
is told, and the server heals itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from cluster.ray_cluster import free_ports
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.chaos.load import PROMPT, Client, Load
from tests.chaos.table import Table
from tests.chaos.waiting import BACK_S, until
from tests.integration.processes import ROOT, Served, replicas, sandbox, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

CONFIG = """
limits: {stall_s: 10}
models:
- {name: pair, family: llama, checkpoint: 'builtin:llama', threads: 1, replicas: {min: 2, max: 2}}
- {name: batch, family: llama, checkpoint: 'builtin:llama', threads: 1, engine: openvino}
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    http_port, grpc_port = free_ports(2)
    with sandbox() as home, serving(home, CONFIG, http_port, grpc_port) as server:
        yield server


@asynccontextmanager
async def load_on(served: Served, model: str, clients: int, tokens: int) -> AsyncIterator[Load]:
    protocols = ("http", "grpc")
    asked = [Client(served.http, served.grpc, model, protocols[i % 2], tokens, 0.02) for i in range(clients)]  # type: ignore[arg-type]
    async with Load(asked).running() as load:
        await load.more(2)
        load.take()
        yield load


def ready(served: Served) -> bool:
    try:
        return httpx.get(f"{served.http}/readyz", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


async def test_a_replica_that_is_killed(served: Served) -> None:
    async with load_on(served, "pair", clients=4, tokens=100) as load:
        before = replicas(served.sandbox, "pair")
        os.kill(min(before), signal.SIGKILL)
        await load.more(20)
        ((counts, gap),) = load.take().values()
        Table().row("kill -9 of one of two replicas", counts, gap)
        assert counts.refused == counts.closed == counts.wrong == counts.lost == 0, counts
        assert counts.ended <= 4, "those that had begun there"
        await until(lambda: len(replicas(served.sandbox, "pair") - before) == 1 and ready(served))
        await load.more(4)
        ((counts, _),) = load.take().values()
        assert counts.bad == 0, counts


async def test_a_replica_that_is_frozen(served: Served) -> None:
    async with load_on(served, "pair", clients=4, tokens=100) as load:
        before = replicas(served.sandbox, "pair")
        os.kill(min(before), signal.SIGSTOP)
        replaced = asyncio.ensure_future(
            until(lambda: min(before) not in (now := replicas(served.sandbox, "pair")) and len(now) == 2)
        )
        seconds = await replaced
        await until(lambda: ready(served))
        await load.more(4)
        ((counts, gap),) = load.take().values()
        Table().row(f"SIGSTOP of one of two replicas ({seconds:.0f} s)", counts, gap)
        assert counts.closed == counts.wrong == counts.lost == 0, counts
        assert counts.right > 0
        assert counts.ended <= 4, "those that had begun there: none hung for longer than limits.stall_s"
        await load.more(4)
        ((counts, _),) = load.take().values()
        assert counts.bad == 0, counts


# Runs a statement in a replica of a model, where `engine` is its engine. In a process of its own: Ray reads how it is
# to authenticate when it is imported.
INJECT = """
import sys
from cluster.noted import noted_address
address, model, statement = noted_address(), *sys.argv[1:]
import ray

def run(replica):
    exec(statement, {"engine": replica._replica_impl._user_callable_wrapper._callable._engine})

ray.init(address=address, namespace="nibble", log_to_driver=False, logging_level="ERROR")
found = next(each for each in ray.util.list_named_actors(all_namespaces=True) if f"#{model}#" in each["name"])
ray.get(ray.get_actor(found["name"], found["namespace"]).__ray_call__.remote(run), timeout=60)
"""


async def inject(served: Served, model: str, statement: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INJECT, model, statement, env=served.sandbox.environment, cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


FAULTS = {
    "an exception outside of the engine's step": "engine._send(lambda: 1 / 0)",
    "a step that fails every time": "engine._batch.step = lambda: 1 / 0",
    "a step that does not end": "import time; engine._batch.step = lambda: time.sleep(600)",
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_engine_that_cannot_compute_any_more(served: Served, fault: str) -> None:
    before = replicas(served.sandbox, "batch")
    began = time.monotonic()
    async with load_on(served, "batch", clients=2, tokens=50) as load:
        await inject(served, "batch", FAULTS[fault])
        await until(lambda: bool(replicas(served.sandbox, "batch") - before) and ready(served))
        seconds = time.monotonic() - began
        await load.more(4)
        ((counts, gap),) = load.take().values()
        Table().row(f"{fault} ({seconds:.0f} s)", counts, gap)
        assert counts.wrong == 0, counts
        assert not any("nothing for" in detail for detail in counts.details), "no request hung"
        await load.more(4)
        ((counts, _),) = load.take().values()
        assert counts.bad == 0, counts


@pytest.mark.parametrize("program", ["haproxy", "HAProxyManager"])
async def test_what_listens_is_back_soon(served: Served, program: str) -> None:
    """Another process listens until Serve has replaced what died. What it had begun breaks."""

    def running(stands_in: bool = False) -> set[int]:
        titles = {pid: title.split() for pid, title in served.sandbox.titled()}
        return {
            pid
            for pid, title in titles.items()
            if program in title[0].rpartition("/")[2] and any("stand-in" in word for word in title) == stands_in
        }

    before = running()
    assert before
    async with load_on(served, "pair", clients=2, tokens=20) as load:
        await load.more(2)
        load.take()
        for pid in before:
            with contextlib.suppress(ProcessLookupError):  # an old one, of an earlier fault
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)  # its last connections break
        seconds = await until(lambda: ready(served))
        print(f"\nkill -9 of {program}: back after {seconds + 0.1:.1f} s")
        await until(lambda: bool(running() - before) and not running(stands_in=True))
        load.take()
        await load.more(10)
        assert running() - before, "Serve's own stays"
        assert not running(stands_in=True)
        ((counts, gap),) = load.take().values()
        Table().row(f"{program} dead and replaced", counts, gap)
        assert counts.bad == 0, counts


async def test_a_message_that_is_far_too_large_is_not_read(served: Served) -> None:
    (router,) = replicas(served.sandbox, "router")
    before = memory(router)
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(served.grpc, options=options) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(pb.GenerateRequest(model="pair", prompt="x" * (100 << 20)))
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert memory(router) - before < 100 << 20


def memory(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def test_connections_with_half_a_request_do_not_stay(served: Served) -> None:
    host, port = served.http.removeprefix("http://").split(":")
    held = []
    try:
        for _ in range(300):
            connection = socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            held.append(connection)
        await until(lambda: ready(served), 8)  # sooner than they are ended
        for connection in held[:3]:
            connection.settimeout(30)
            answer = await asyncio.to_thread(connection.recv, 1000)
            assert b"408" in answer or answer == b"", answer
    finally:
        for connection in held:
            connection.close()


async def test_sigterm_lets_streams_end_and_takes_nothing_new(served: Served) -> None:
    """The last one: it ends the server."""
    body = {"model": "pair", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "temperature": 0, "n": 12}
    async with httpx.AsyncClient(timeout=BACK_S, trust_env=False) as client:

        async def stream(begun: asyncio.Event) -> list[str]:
            lines = []
            async with client.stream("POST", f"{served.http}/v1/completions", json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        begun.set()
                        lines.append(line)
            return lines

        async def refuses() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return (await client.get(f"{served.http}/readyz", timeout=30)).status_code == 503
            return False

        begun = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(stream(each)) for each in begun]
        await asyncio.wait_for(asyncio.gather(*(each.wait() for each in begun)), BACK_S)
        served.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not await refuses():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert not any(stream.done() for stream in streams), "they are still under way"
        refused = await client.post(f"{served.http}/v1/completions", json=body)
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "no_replica"
        for lines in await asyncio.gather(*streams):
            assert lines[-1] == "data: [DONE]"
            assert sum('"finish_reason":"length"' in line for line in lines) == 12
            assert not any('"error"' in line for line in lines)
    assert await asyncio.to_thread(served.process.wait, 150) == 0
    assert served.sandbox.wait_no_processes() == []
