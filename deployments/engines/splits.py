"""How to split a node's cores among replicas: tried out, each split with as many child processes as it has replicas."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import IO, NamedTuple

from cluster.errors import EngineError
from cluster.model_config import ModelConfig
from deployments.engines.loading import ENVIRONMENT
from deployments.engines.measure import EngineLoad, Measurement


class Split(NamedTuple):
    replicas: int
    threads: int


class Result(NamedTuple):
    """Of one split under a load: output tokens/s of all its replicas together, medians of milliseconds."""

    split: Split
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float


def splits(cores: int) -> list[Split]:
    """Every number of threads that is a power of two, or all cores, with as many replicas as then fit; a split that
    leaves more cores idle than another with as many replicas is left out."""
    threads = sorted({cores, *(1 << power for power in range(cores.bit_length()) if 1 << power <= cores)})
    best: dict[int, Split] = {}
    for count in threads:
        best[cores // count] = Split(cores // count, count)
    return sorted(best.values(), reverse=True)


def shares(concurrency: int, replicas: int) -> list[int]:
    """As a router spreads its requests: evenly."""
    return [concurrency // replicas + (index < concurrency % replicas) for index in range(replicas)]


def try_split(
    folders: Sequence[Path], model: ModelConfig, split: Split, cores: Sequence[int], load: EngineLoad, rounds: int
) -> Result:
    """Medians over the rounds; `folders`: of the model's artifacts. Raises EngineError, with what a replica said, where
    one fails."""
    sized = model.model_copy(update={"threads": split.threads})
    with ExitStack() as stack:
        replicas = []
        for index in range(split.replicas):
            own = cores[index * split.threads : (index + 1) * split.threads]
            replicas.append(stack.enter_context(measuring(folders, sized, own, index)))
        # One replica or several: each gets its share of the clients, and of the requests.
        per_client = max(1, load.requests // load.concurrency)
        loads = [
            load.model_copy(update={"concurrency": share, "requests": share * per_client})
            for share in shares(load.concurrency, split.replicas)
            if share
        ]
        measured = [together(replicas, loads) for _ in range(rounds)]
    return Result(
        split,
        median(sum(m.output_tokens for m in each) / max(m.seconds for m in each) for each in measured),
        median(m.ttft_ms for each in measured for m in each),
        median(m.tpot_ms for each in measured for m in each),
    )


Ask = Callable[[EngineLoad], Callable[[], Measurement]]


def together(replicas: Sequence[Ask], loads: Sequence[EngineLoad]) -> list[Measurement]:
    answers = [ask(load) for ask, load in zip(replicas, loads, strict=False)]
    return [answer() for answer in answers]


@contextmanager
def measuring(folders: Sequence[Path], model: ModelConfig, cores: Sequence[int], seed: int) -> Iterator[Ask]:
    """A replica's engine in a process of its own, loaded and warm. What it yields sends it a load at once and returns
    what waits for the answer."""
    command = [sys.executable, "-m", "deployments.engines.measure", model.model_dump_json(), *map(str, folders)]
    command += ["--cores", ",".join(map(str, cores)), "--seed", str(seed)]
    environment = os.environ | ENVIRONMENT[model.engine]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        assert child.stdin is not None, "it is a pipe"

        def line() -> str:
            read: str = _pipe(child.stdout).readline()
            if not read:
                said = " | ".join(_pipe(child.stderr).read().strip().splitlines()[-3:])
                raise EngineError(f"a replica with {model.threads} thread(s) ended with {child.wait()}: {said}")
            return read

        def ask(load: EngineLoad) -> Callable[[], Measurement]:
            pipe = _pipe(child.stdin)
            pipe.write(load.model_dump_json() + "\n")
            pipe.flush()
            return lambda: Measurement.model_validate_json(line())

        try:
            line()
            yield ask
        finally:
            child.stdin.close()
            child.terminate()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "asked for"
    return pipe
