"""What serving adds to the first token: the time to it that clients of `nibble serve` see, less the time that the
engine took from being asked to having it, for the same requests.

    python -m tests.bench.first_token CHECKPOINT [--family llama] [--concurrency 1,4,8,16] [--rounds 3]

Engine openvino, whose counters sum the latter. Two processes differ by more than that, by chance, and in a closed loop
a request that comes a little later may wait a step longer; so both times are of one process and of the same requests,
and means, whose difference is the mean of the differences.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from cluster.bench.grpc_client import GrpcClient
from cluster.bench.http_client import HttpClient
from cluster.bench.prompts import token_prompts
from cluster.bench.records import Client, Prompt
from cluster.commands.status import ask
from cluster.config import ModelConfig
from cluster.ray_cluster import free_ports, joined_cluster
from tests.bench.compare import CONTEXT, nibble_config, running

REQUESTS = 8  # of each client


async def client_times(client: Client, prompts: Iterator[Prompt], concurrency: int) -> list[float]:
    """Seconds to the first token, of each request."""

    async def one_after_the_other() -> list[float]:
        times = []
        for _ in range(REQUESTS):
            sent = time.perf_counter()
            reply = await client.complete(next(prompts), {})
            if reply.failure:
                raise RuntimeError(str(reply.failure))
            times.append(reply.chunks[0] - sent)
        return times

    return list(chain.from_iterable(await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))))


async def added_ms(client: Client, prompts: Iterator[Prompt], concurrency: int) -> tuple[float, float]:
    """Means of the milliseconds to the first token, of clients and of the engine."""
    before = await ask("model", "info")
    seen = await client_times(client, prompts, concurrency)
    after = await ask("model", "info")
    assert after["requests"] - before["requests"] == len(seen), "nobody else asks"
    return 1000 * mean(seen), 1000 * (after["first_token_s"] - before["first_token_s"]) / len(seen)


async def measure(http: str, grpc: str, given: argparse.Namespace) -> Table:
    """`http`, `grpc`: URLs."""
    clients: dict[str, Client] = {
        "HTTP": HttpClient(http, "model", given.output_tokens, None, time.perf_counter),
        "gRPC": GrpcClient(grpc, "model", given.output_tokens, None, time.perf_counter),
    }
    prompts = token_prompts(given.seed, given.input_tokens, given.vocabulary)
    table = Table(
        "concurrency", "over", "client, ms", "engine, ms", "added, ms", title="first token, medians of rounds"
    )
    for client in clients.values():
        await client_times(client, prompts, 1)
    for concurrency in map(int, given.concurrency.split(",")):
        rounds = [
            {name: await added_ms(client, prompts, concurrency) for name, client in clients.items()}
            for _ in range(given.rounds)
        ]
        for name in clients:
            seen, engine = (median(each[name][place] for each in rounds) for place in (0, 1))
            added = median(each[name][0] - each[name][1] for each in rounds)
            table.add_row(str(concurrency), name, f"{seen:.1f}", f"{engine:.1f}", f"{added:.1f}")
    for client in clients.values():
        await client.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--concurrency", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=500)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    given = parser.parse_args()
    if "RAY_AUTH_MODE" not in os.environ:  # of the node that is started here; Ray reads it when it is imported
        environment = os.environ | {"RAY_AUTH_MODE": "token"}
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench.first_token", *sys.argv[1:]], environment)
    model = ModelConfig(
        name="model", family=given.family, checkpoint=str(given.checkpoint.absolute()), engine="openvino",
        threads=given.threads, context=CONTEXT,
    )  # fmt: skip
    http, grpc = free_ports(2)
    over_http, over_grpc = f"http://127.0.0.1:{http}", f"grpc://127.0.0.1:{grpc}"
    with tempfile.TemporaryDirectory() as scratch:
        config, log = Path(scratch) / "nibble.yaml", Path(scratch) / "nibble.log"
        config.write_text(nibble_config(model, http, grpc))
        serve = [sys.executable, "-m", "cluster.cli", "serve", str(config)]
        with running(serve, f"{over_http}/readyz", log):
            address = re.findall(r"Ray cluster at (\S+)", log.read_text())[0]
            with joined_cluster(address):
                Console().print(asyncio.run(measure(over_http, over_grpc, given)))


if __name__ == "__main__":
    main()
