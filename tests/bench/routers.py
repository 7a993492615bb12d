"""The tokens that one and two routers carry: four models whose engines cost nothing, HTTP streams, 16 clients.

    python -m tests.bench.routers [--routers 1 2] [--rounds 3] [--seconds 10]

A cluster of Ray, Serve, HAProxy and the router are as `nibble serve` has them; a replica is a loop that yields chunks.
In each round every number of routers has its turn. Besides tokens/s the table has where the CPU time of this machine
went, in cores: on a machine of two cores the routers share them with all that a token passes before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from cluster.commands.serve import wait_answering
from cluster.config import NibbleConfig, default_config
from cluster.model_config import ROUTER_NAME
from cluster.ray_cluster import free_ports, local_cluster
from deployments.records import GenerationChunk, GenerationRequest
from tests.bench.measured import title_of
from tests.ray_titles import replica_of

CLIENTS, TOKENS = 16, 100
WARM_S = 3.0
# What a process of no replica has in its title.
MARKS = {"HAProxy": "haproxy", "clients": "tests.bench.routers"}
ELSE = "all else"
PARTS = ("router", "replicas", *MARKS, ELSE)
NOW = time.perf_counter


class FreeReplica:
    """A replica's part in a request, without an engine."""

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        count = request.max_tokens or 0
        for index in range(count):
            await asyncio.sleep(0)
            yield GenerationChunk(" token", (index,), "length" if index == count - 1 else None, 4, index + 1)


class Client(asyncio.Protocol):
    """Asks for streams one after the other, each on a connection of its own, and looks only for their end."""

    def __init__(self, request: bytes, ended: asyncio.Future[bytes]) -> None:
        self._request, self._ended, self._tail = request, ended, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._tail = self._tail[-64:] + data

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(self._tail)


async def ask(url: str, models: Sequence[str], seconds: float) -> float:
    """Tokens/s of the streams that were whole, between the end of the first round trips and `seconds` later."""
    parts = urlsplit(url)
    loop, tokens, end = asyncio.get_running_loop(), 0, NOW() + WARM_S + seconds

    async def client(model: str) -> None:
        nonlocal tokens
        body = f'{{"model": "{model}", "prompt": "a", "max_tokens": {TOKENS}, "stream": true}}'.encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        while NOW() < end:
            ended: asyncio.Future[bytes] = loop.create_future()
            await loop.create_connection(
                lambda ended=ended: Client(head.encode() + body, ended), parts.hostname, parts.port
            )
            tail = await ended
            if b"[DONE]" not in tail:
                raise RuntimeError(f"a stream was not whole: {tail!r}")
            if end - seconds < NOW() < end:
                tokens += TOKENS

    await asyncio.gather(*(client(models[index % len(models)]) for index in range(CLIENTS)))
    return tokens / seconds


def part_of(title: str) -> str:
    if deployment := replica_of(title):
        return "router" if deployment == ROUTER_NAME else "replicas"
    return next((part for part, mark in MARKS.items() if mark in title), ELSE)


def cpu_by_part() -> dict[str, float]:
    """CPU seconds of this machine's processes so far, by what they are."""
    found: dict[str, float] = defaultdict(float)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue  # it has ended
        found[part_of(title_of(int(stat.parent.name)))] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


def measured(url: str, models: Sequence[str], seconds: float) -> tuple[float, dict[str, float]]:
    """Tokens/s, and cores by part."""
    command = [sys.executable, "-m", "tests.bench.routers", "--ask", url, *models, "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
        time.sleep(WARM_S)
        before = cpu_by_part()
        time.sleep(seconds - 1)
        after = cpu_by_part()
        output, _ = child.communicate()
    if child.returncode != 0:
        raise RuntimeError("the clients failed")
    return float(output), {part: (after[part] - before[part]) / (seconds - 1) for part in after}


def url_of(config: NibbleConfig) -> str:
    return f"http://{config.http.host}:{config.http.port}"


def deployed(config: NibbleConfig) -> None:
    """Brings the running cluster to it: the routers, and a free replica of each model."""
    from ray import serve

    from cluster.commands.rollout import deploy, deploy_router, router_target
    from deployments.app import versioned
    from deployments.router_settings import RouterSettings

    settings = RouterSettings(config=config, apps={model.name: model.deployment for model in config.models})
    targets = []
    for model in config.models:
        replica = serve.deployment(FreeReplica).options(
            name=model.deployment, max_ongoing_requests=CLIENTS, ray_actor_options={"num_cpus": 0}, user_config={}
        )
        targets.append(serve.RunTarget(versioned(replica, "1").bind(), name=model.deployment, route_prefix=None))
    deploy([router_target(settings), *targets])
    deploy_router(settings)
    wait_answering(url_of(config))


def rounds(config: NibbleConfig, given: argparse.Namespace) -> Iterator[tuple[int, float, dict[str, float]]]:
    url, models = url_of(config), [model.name for model in config.models]
    for _ in range(given.rounds):
        for count in given.routers:
            deployed(config.model_copy(update={"router": config.router.model_copy(update={"replicas": count})}))
            yield count, *measured(url, models, given.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--ask", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ask:
        print(asyncio.run(ask(given.ask[0], given.ask[1:], given.seconds)))
        return
    http, grpc = free_ports(2)
    config = default_config()
    config = config.model_copy(
        update={
            "http": config.http.model_copy(update={"port": http}),
            "grpc": config.grpc.model_copy(update={"port": grpc}),
        }
    )
    with local_cluster(8, limits=config.limits):
        from ray import serve

        from deployments.app import grpc_options

        serve.start(http_options={"host": config.http.host, "port": http}, grpc_options=grpc_options(grpc))
        found = list(rounds(config, given))
    table = Table("routers", "tokens/s", *PARTS, title="medians; cores by part")
    for count in given.routers:
        rates = [rate for routers, rate, _ in found if routers == count]
        cores = [parts for routers, _, parts in found if routers == count]
        cells = [f"{statistics.median(each.get(part, 0.0) for each in cores):.2f}" for part in PARTS]
        table.add_row(str(count), f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
