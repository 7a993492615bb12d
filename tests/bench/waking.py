"""From a request to a model that sleeps (`replicas: {min: 0}`) to its first token: a replica starts, from the node's
cache.

    python -m tests.bench.waking CHECKPOINT [--family llama] [--engine openvino] [--threads 2] [--rounds 4]

The first round converts, or restores, and is not in the medians. Seconds of each round, from the request on: when the
replica's process began, when its engine was loaded, and the first token; and what the replica's log says of its stages.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from pathlib import Path

import httpx

from cluster.ray_cluster import free_ports
from tests.integration.processes import Served, replicas, sandbox, serving

LEAVE_S = 300.0
LOADED = re.compile(r"is loaded: (.*)")


def began(pid: int) -> float:
    """When the process did, in seconds since the machine's boot."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def stages(served: Served) -> str:
    """Of the replica that was loaded last."""
    logs = sorted(served.sandbox.ray_tmpdir.rglob("serve/replica_*model*.log"), key=lambda log: log.stat().st_mtime)
    found = LOADED.findall(logs[-1].read_text()) if logs else []
    return found[-1] if found else "no stages in its log"


def wake(served: Served) -> tuple[float, float]:
    """Seconds until the process began and until the first token."""
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    body = {"model": "model", "prompt": "Q:", "max_tokens": 4, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.http}/v1/completions", json=body, timeout=LEAVE_S, trust_env=False) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("data: {"))
        first = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        (pid,) = replicas(served.sandbox, "model")
        return began(pid) - started, first


def sleep(served: Served) -> None:
    until = time.monotonic() + LEAVE_S
    while replicas(served.sandbox, "model"):
        assert time.monotonic() < until, "it does not sleep"
        time.sleep(0.5)
    time.sleep(5)  # so that nothing ends still


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    config = (
        f"models:\n- {{name: model, family: {given.family}, checkpoint: '{given.checkpoint}', engine: {given.engine},"
        f" threads: {given.threads}, replicas: {{min: 0, max: 1, downscale_delay_s: 1}}}}\n"
    )
    found = []
    with sandbox() as home, serving(home, config, *free_ports(2)) as served:
        for number in range(given.rounds + 1):
            process, first = wake(served)
            print(f"process {process:.1f} s, first token {first:.1f} s; {stages(served)}", flush=True)
            if number:
                found.append((process, first))
            sleep(served)
    process, first = (statistics.median(each) for each in zip(*found, strict=True))
    print(f"medians of {len(found)}: process {process:.1f} s, first token {first:.1f} s")


if __name__ == "__main__":
    main()
