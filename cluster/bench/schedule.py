"""How much is sent, and when: pure functions of the settings."""

from __future__ import annotations

import math
from itertools import count, takewhile
from random import Random

from cluster.bench.load_records import Load, LoadSettings

LEAST_REQUESTS = 8
REQUESTS_A_WORKER = 4
OPEN_LOOP_S = 10


def request_count(load: Load, requests: int | None, duration_s: float | None) -> int | None:
    """Of a run, as asked for; without a bound 4 for each worker or 10 seconds' worth, at least 8. None: as many as
    `duration_s` allows."""
    if requests is not None or duration_s is not None:
        return requests
    each = REQUESTS_A_WORKER if load.kind == "concurrency" else OPEN_LOOP_S
    return max(LEAST_REQUESTS, math.ceil(each * load.value))


def arrivals(rate: float, requests: int | None, duration_s: float | None, seed: str) -> list[float]:
    """Seconds from the start at which requests are due: a Poisson process, the same for the same seed. One of the two
    bounds must be given."""
    random = Random(seed)
    time = 0.0

    def following() -> float:
        nonlocal time
        time += random.expovariate(rate)
        return time

    numbers = count() if requests is None else range(requests)
    limit = math.inf if duration_s is None else duration_s
    return list(takewhile(lambda due: due < limit, (following() for _ in numbers)))


def turns(settings: LoadSettings) -> list[tuple[Load, int, int]]:
    """(load, round, server) of every run in order. The servers take turns within each round, and every other round
    begins with the last of them: what changes on the machine meanwhile, changes for all."""
    places = range(len(settings.servers))
    return [
        (load, round, server)
        for load in settings.loads
        for round in range(settings.rounds)
        for server in (places if round % 2 == 0 else reversed(places))
    ]
