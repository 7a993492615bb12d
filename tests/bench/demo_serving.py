"""Tokens per second of a running `nibble serve`, one request at a time, through HTTP and through gRPC.

    python -m tests.bench.demo_serving [--http URL] [--grpc HOST:PORT] [--rounds 7]

The two protocols take turns in every round; the table has medians. The demo models are tiny (1 to 2 million weights),
so this shows the cost of serving a token, not of computing one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from cluster.families import FAMILIES, FAMILY_NAMES
from deployments.client import NibbleClient

MAX_TOKENS = 200
TEMPERATURE = 2.0  # far from the memorized text, so that the end-of-text token comes late


def tokens(client: NibbleClient, family: str, seed: int) -> int:
    """Streams one completion; the number of its tokens."""
    prompt = FAMILIES[family].demo_prompt
    stream = client.stream(family, prompt, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=seed)
    for _ in stream:
        pass
    assert stream.usage is not None, "the end of a stream has the usage"
    return stream.usage.completion_tokens


def rate(call: Callable[[], int]) -> float:
    started = time.perf_counter()
    return call() / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http", default="http://127.0.0.1:8000")
    parser.add_argument("--grpc", default="127.0.0.1:9000")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    table = Table("family", "HTTP tokens/s", "gRPC tokens/s", "gRPC / HTTP", title="one stream, medians")
    with NibbleClient(arguments.http) as http, NibbleClient(f"grpc://{arguments.grpc}") as grpc:
        for family in FAMILY_NAMES:
            tokens(http, family, 0), tokens(grpc, family, 0)
            pairs = [
                (
                    rate(lambda family=family, seed=seed: tokens(http, family, seed)),
                    rate(lambda family=family, seed=seed: tokens(grpc, family, seed)),
                )
                for seed in range(1, arguments.rounds + 1)
            ]
            over_http, over_grpc = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(g / h for h, g in pairs)
            table.add_row(family, f"{over_http:.0f}", f"{over_grpc:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
