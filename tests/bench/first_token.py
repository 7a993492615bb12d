"""What serving adds to the first token: the time to it that clients of `nibble serve` see, less the time that the
engine took from being asked to having it, for the same requests.

    python -m tests.bench.first_token CHECKPOINT [--family llama] [--concurrency 1,4,8,16] [--rounds 3]

Tokens that are no text by themselves (a part of a character, an end token) are left out by a logit bias: a client has
nothing to see of them until a later one comes, which random weights, that repeat them, may put off for many steps.

Engine openvino, whose counters sum the latter. Two processes differ by more than that, by chance, and in a closed loop
a request that comes a little later may wait a step longer; so both times are of one process and of the same requests,
and means, whose difference is the mean of the differences.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from cluster.bench.grpc_client import GrpcClient
from cluster.bench.http_client import HttpClient
from cluster.bench.load_records import Client, Fields, Prompt
from cluster.bench.prompts import token_prompts
from cluster.checkpoints.folder import read_config
from cluster.commands.status import replica_info
from cluster.ray_cluster import joined_cluster
from deployments.generation.text import IncrementalDetokenizer, Tokenizer
from tests.bench.serving import NOW, Served, model_of, run_with, serving, workload_parser

REQUESTS = 8  # of each client
NEVER = -100.0  # a logit bias


def without_text(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """The tokens that are no text by themselves, and those that end one."""
    return [
        token
        for token in range(vocabulary)
        if token in tokenizer.eos_ids or not IncrementalDetokenizer(tokenizer, continues=True).add([token])
    ]


async def client_times(client: Client, fields: Fields, prompts: Iterator[Prompt], concurrency: int) -> list[float]:
    """Seconds to the first token, of each request."""

    async def one_after_the_other() -> list[float]:
        times = []
        for _ in range(REQUESTS):
            sent = NOW()
            reply = await client.complete(next(prompts), fields)
            if reply.failure:
                raise RuntimeError(str(reply.failure))
            times.append(reply.chunks[0] - sent)
        return times

    return list(chain.from_iterable(await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))))


async def added_ms(client: Client, fields: Fields, prompts: Iterator[Prompt], concurrency: int) -> tuple[float, float]:
    """Means of the milliseconds to the first token, of clients and of the engine."""
    before = await replica_info("model")
    seen = await client_times(client, fields, prompts, concurrency)
    after = await replica_info("model")
    assert after["requests"] - before["requests"] == len(seen), "nobody else asks"
    return 1000 * mean(seen), 1000 * (after["first_token_s"] - before["first_token_s"]) / len(seen)


async def measure(served: Served, given: argparse.Namespace) -> Table:
    clients: dict[str, Client] = {
        "HTTP": HttpClient(served.http, "model", given.output_tokens, None, NOW),
        "gRPC": GrpcClient(served.grpc, "model", given.output_tokens, None, NOW),
    }
    excluded = without_text(Tokenizer(given.checkpoint), read_config(given.checkpoint)["vocab_size"])
    fields = {"logit_bias": dict.fromkeys(excluded, NEVER)}
    prompts = token_prompts(given.seed, given.input_tokens, given.vocabulary)
    table = Table(
        "concurrency", "over", "client, ms", "engine, ms", "added, ms", title="first token, medians of rounds"
    )
    for client in clients.values():
        await client_times(client, fields, prompts, 1)
    for concurrency in map(int, given.concurrency.split(",")):
        rounds = [
            {name: await added_ms(client, fields, prompts, concurrency) for name, client in clients.items()}
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
    parser = workload_parser(__doc__)
    parser.add_argument("--concurrency", default="1,4,8,16")
    given = parser.parse_args()
    # Of the node that is started here; Ray reads it when it is imported.
    run_with({"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}, "tests.bench.first_token")
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(model_of(given, "openvino"), Path(scratch)) as served,
        joined_cluster(served.cluster),
    ):
        Console().print(asyncio.run(measure(served, given)))


if __name__ == "__main__":
    main()
