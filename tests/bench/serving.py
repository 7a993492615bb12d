"""What the benchmarks of serving share: their command line, the model, and a `nibble serve` of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from cluster.model_config import ModelConfig
from cluster.ray_cluster import free_ports

ROOT = Path(__file__).parents[2]
NOW = time.perf_counter
CONTEXT = 512
START_S = 180


class Served(NamedTuple):
    """URLs, and the address of its Ray cluster."""

    http: str
    grpc: str
    cluster: str


def workload_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=500)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    return parser


def model_of(given: argparse.Namespace, engine: str) -> ModelConfig:
    return ModelConfig(
        name="model", family=given.family, checkpoint=str(given.checkpoint.absolute()), engine=engine,
        threads=given.threads, context=CONTEXT,
    )  # fmt: skip


def run_with(variables: dict[str, str], module: str) -> None:
    """Starts this program again where its environment has not these: some are read once, at the start or at import."""
    environment = os.environ | variables
    if os.environ != environment:
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


@contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[None]:
    """A server, once it answers at the URL `ready`; ended at the end by SIGINT. Raises RuntimeError with its log."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT) as child:
        try:
            deadline = NOW() + START_S
            while not answers(ready):
                if child.poll() is not None or NOW() > deadline:
                    raise RuntimeError(f"{command[0]} is not ready: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield
        finally:
            child.send_signal(2)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serving(model: ModelConfig, scratch: Path) -> Iterator[Served]:
    """`nibble serve` of one model, ready; `scratch`: a folder for its config and log."""
    http, grpc = free_ports(2)
    config, log, url = scratch / "nibble.yaml", scratch / "nibble.log", f"http://127.0.0.1:{http}"
    model_values = model.model_dump(mode="json", exclude_defaults=True)
    # YAML is a superset of JSON.
    config.write_text(json.dumps({"http": {"port": http}, "grpc": {"port": grpc}, "models": [model_values]}))
    with running([sys.executable, "-m", "cluster.cli", "serve", str(config)], f"{url}/readyz", log):
        (cluster,) = re.findall(r"Ray cluster at (\S+)", log.read_text())
        yield Served(url, f"grpc://127.0.0.1:{grpc}", cluster)
