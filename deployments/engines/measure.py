"""Measures an engine in this process, with no serving layer: `python -m deployments.engines.measure MODEL FOLDER…`.

A child process, so that several can run side by side as replicas do. MODEL is a served model's configuration as JSON,
FOLDER its artifact, a second one that of its draft model.
It loads the engine, warms it up and prints a line `ready`; each line on stdin, a Load as JSON, is run once and answered
with a Measurement, a line of JSON. It ends with stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

from cluster.artifacts.manifest import Record
from cluster.model_config import ModelConfig
from deployments.engines.base import Engine, TokenRequest
from deployments.engines.loading import load_engine
from deployments.records import SamplingParams


class EngineLoad(Record):
    """Closed loop: `concurrency` clients, each of which sends its next request when its last one has ended, `requests`
    in all. No two prompts of a process are the same, so that no cache helps."""

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int


class Measurement(Record):
    """`seconds` from the first request to the end of the last; medians over requests of the milliseconds to the first
    token and between two later ones."""

    seconds: float
    output_tokens: int
    ttft_ms: float
    tpot_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


async def measure(engine: Engine, load: EngineLoad, prompts: Iterator[list[int]]) -> Measurement:
    firsts, laters, count = [], [], 0
    queue = list(islice(prompts, load.requests))

    async def client() -> None:
        nonlocal count
        while queue:
            started = time.perf_counter()
            first, tokens = 0.0, 0
            request = TokenRequest(queue.pop(), load.output_tokens, SamplingParams(temperature=0))
            async for batch in engine.generate(request):
                first, tokens = first or time.perf_counter(), tokens + len(batch)
            firsts.append(first - started)
            laters.append((time.perf_counter() - first) / max(1, tokens - 1))
            count += tokens

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    seconds = time.perf_counter() - started
    ttft, tpot = (1000 * median(times) for times in (firsts, laters))
    return Measurement(seconds=seconds, output_tokens=count, ttft_ms=ttft, tpot_ms=tpot)


def unique_prompts(vocab_size: int, seed: int, length: int) -> Iterator[list[int]]:
    """Of random tokens, for ever."""
    draw = random.Random(seed)
    while True:
        yield [draw.randrange(3, vocab_size) for _ in range(length)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deployments.engines.measure", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=ModelConfig.model_validate_json)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--cores", type=lambda text: tuple(map(int, text.split(","))), default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    engine = load_engine(given.model, given.folders, given.cores)
    try:
        warm = EngineLoad(concurrency=1, requests=1, input_tokens=8, output_tokens=4)
        asyncio.run(measure(engine, warm, unique_prompts(engine.vocab_size, -1, 8)))
        while not engine.info().get("kv_cache_populated", True):
            time.sleep(0.1)
        print("ready", flush=True)
        for number, line in enumerate(sys.stdin):
            load = EngineLoad.model_validate_json(line)
            prompts = unique_prompts(engine.vocab_size, 1000 * given.seed + number, load.input_tokens)
            print(asyncio.run(measure(engine, load, prompts)).model_dump_json(), flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
