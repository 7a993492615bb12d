"""A simulated model under overload: who is served, how long it waits, and what the refused are told."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from cluster.errors import QueueFullError
from deployments.routing.admission import AdmissionQueue, Bounds, QueuePlace
from tests.unit.deployments.routing.test_admission import Capacity, Clock


class Simulation:
    """`places` completions at once, each of `speed` tokens a second; clients come in an open loop, by `arrivals` of
    (seconds, flow, tokens), and leave after `patience` seconds without a place. `estimate` of what they take."""

    def __init__(self, places: int, speed: float, bounds: Bounds) -> None:
        self.clock, self.speed, self.places = Clock(), speed, places
        self.queue = AdmissionQueue("m", Capacity(places), bounds, self.clock)
        self.served: Counter[str] = Counter()  # tokens, by flow
        self.waits: dict[str, list[tuple[float, float]]] = defaultdict(list)  # when one came, and how long it waited
        self.refused: dict[str, list[tuple[float, int]]] = defaultdict(list)  # when, and the seconds told
        self.longest = self.serial = 0
        self.events: list[tuple[float, int, object]] = []

    def run(self, arrivals: Iterator[tuple[float, str, int]], patience: Iterator[float | None]) -> None:
        self._next(arrivals)
        while self.events:
            at, _, event = heapq.heappop(self.events)
            self.clock.now = at
            match event:
                case (str(flow), int(tokens)):
                    self._come(flow, tokens, next(patience))
                    self._next(arrivals)
                case (QueuePlace() as place, int(tokens)):  # it has been served
                    self.served[str(place.flow)] += tokens
                    self.queue.leave(place, tokens)
                case QueuePlace() as place if place.started_at is None:  # its client leaves
                    self.queue.leave(place)
            self.longest = max(self.longest, len(self.queue))
            self.queue.check_integrity()

    def _next(self, arrivals: Iterator[tuple[float, str, int]]) -> None:
        for seconds, flow, tokens in arrivals:
            self._at(self.clock.now + seconds, (flow, tokens))
            return

    def _at(self, when: float, event: object) -> None:
        self.serial += 1
        heapq.heappush(self.events, (when, self.serial, event))

    def _come(self, flow: str, tokens: int, patience: float | None) -> None:
        now = self.clock.now
        try:
            place = self.queue.enter(flow, 150)  # the mean of all
        except QueueFullError as error:
            self.refused[flow].append((now, error.retry_after_s))
            return

        def begin() -> None:
            if place.refusal is not None:
                assert isinstance(place.refusal, QueueFullError)
                self.refused[flow].append((now, place.refusal.retry_after_s))
                return
            self.waits[flow].append((now, self.clock.now - now))
            self._at(self.clock.now + tokens / self.speed, (place, tokens))

        place.wake = begin
        if place.started_at is not None:
            begin()
        elif patience is not None:
            self._at(now + patience, place)


def arrivals(seed: int, count: int, rate: float, weights: dict[str, float]) -> Iterator[tuple[float, str, int]]:
    """Poisson; sizes are exponential, with 150 tokens in the mean."""
    random_ = random.Random(seed)
    for _ in range(count):
        (flow,) = random_.choices(list(weights), list(weights.values()))
        yield random_.expovariate(rate), flow, 1 + int(random_.expovariate(1 / 150))


def no_patience() -> Iterator[float | None]:
    while True:
        yield None


# 8 places of 20 tokens a second, so 1.07 completions a second.
CAPACITY = 8 * 20 / 150


@pytest.mark.parametrize("seed", range(3))
def test_two_keys_of_very_different_load_are_served_alike(seed: int) -> None:
    simulation = Simulation(8, 20, Bounds(64, 1 << 20))
    weights = {"heavy": 5.0, "light": 1.0}
    # 4 times the capacity, of which the light key asks for two thirds: both have work, but for moments.
    simulation.run(arrivals(seed, 4000, 4 * CAPACITY, weights), no_patience())
    heavy, light = simulation.served["heavy"], simulation.served["light"]
    assert light == pytest.approx(heavy, rel=0.1)
    assert simulation.longest <= 64


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("leaving", [0.0, 0.5], ids=["all stay", "half leave early"])
def test_retry_after_is_the_wait_that_a_retry_meets(seed: int, leaving: float) -> None:
    random_ = random.Random(seed)

    def patience() -> Iterator[float | None]:
        while True:
            yield random_.uniform(0, 30) if random_.random() < leaving else None

    simulation = Simulation(8, 20, Bounds(64, 1 << 20))
    simulation.run(arrivals(seed, 3000, 3 * CAPACITY, {"heavy": 5.0, "light": 1.0}), patience())
    ratios = []
    for flow, refusals in simulation.refused.items():
        waits = iter(sorted(simulation.waits[flow]))
        met = next(waits)
        # In the first minute the queue fills.
        for refused_at, told in (each for each in refusals if each[0] > 1060):
            while met[0] < refused_at + told:  # who comes next when the retry is due stands for the retry
                following = next(waits, None)
                if following is None:
                    break
                met = following
            if met[0] >= refused_at + told:
                ratios.append(told / max(met[1], 0.5))
    within = sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios)
    assert len(ratios) > 100
    assert 0.5 <= statistics.median(ratios) <= 2
    assert within > 0.9
