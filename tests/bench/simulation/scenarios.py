"""What is run: each scenario gives rows of figures, which `__main__` prints and `plots` draws. A model of 1.4 billion
weights, engine openvino, 2 cores a replica (`engine.ZEN5`)."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from cluster.model_config import ModelConfig
from tests.bench.simulation import virtual_time
from tests.bench.simulation.cell import Cell, Outcome
from tests.bench.simulation.choices import Cheapest, Choice, LeastBusy, PowerOfTwo
from tests.bench.simulation.engine import ZEN5
from tests.bench.simulation.fetching import ObjectStore, herd
from tests.bench.simulation.figures import Lag, Percentiles, RunFigures, figures_of, percentiles, scale_up_lags
from tests.bench.simulation.scaling import ByLoad, ServeDefault
from tests.bench.simulation.traces import KINDS, TraceKind, mixed, steps_of, trace

CHOICES: dict[str, Callable[[Cell], Choice]] = {
    "cost": Cheapest,
    "least busy": lambda cell: LeastBusy(),
    "power of two": lambda cell: PowerOfTwo(),
}
ARTIFACT_BYTES = 769_000_000
# Seconds from the decision until a replica takes requests, from the node's cache (docs/performance.md: 10 to 12).
START_S = 11.0
GBIT = 125_000_000  # bytes a second

History = list[tuple[float, int, int, int, int]]


def model_config(**queue: int) -> ModelConfig:
    given = {"name": "model", "family": "llama", "checkpoint": "builtin:llama", "engine": "openvino", "context": 8192}
    return ModelConfig.model_validate({**given, "queue": queue})


class Steady(NamedTuple):
    """`ongoing`: mean completions at a replica; `longest_queue`: of all routers together."""

    kind: str
    choice: str
    replicas: int
    routers: int
    rate: float
    figures: RunFigures
    ongoing: float
    longest_queue: int


async def steady(
    kind: TraceKind,
    rate: float,
    replicas: int,
    seconds: float,
    choice: str = "cost",
    routers: int = 1,
    sessions: bool = False,
    seed: int = 1,
    **queue: int,
) -> Steady:
    """A load that does not change, at a fixed number of replicas. The first quarter fills caches and does not count."""
    cell = Cell(model_config(**queue), ZEN5, CHOICES[choice], replicas, routers=routers, sessions=sessions)
    await cell.ask_all(trace(kind, rate, seconds, seed))
    cell.stop()
    during = [row for row in cell.history if seconds / 4 <= row[0] <= seconds]
    counted = [each for each in cell.outcomes if each.came >= seconds / 4]
    name = f"{choice}, sessions" if sessions else choice
    ongoing = statistics.fmean(running for _, _, _, running, _ in during) / replicas
    longest = max(row[4] for row in cell.history)
    return Steady(kind.name, name, replicas, routers, rate, figures_of(cell, counted), ongoing, longest)


def load(kind: str) -> list[Steady]:
    """Ten replicas, more and more load."""
    rates = {"conversation": (0.04, 0.08, 0.12, 0.16, 0.20, 0.24), "code": (0.02, 0.04, 0.06, 0.08, 0.10)}[kind]
    return [virtual_time.run(lambda rate=rate: steady(KINDS[kind], 10 * rate, 10, 900)) for rate in rates]


def routing() -> list[Steady]:
    """Ten replicas, one load, all ways to choose one of them."""
    kind, rate = KINDS["conversation"], 1.6
    runs = [virtual_time.run(lambda name=name: steady(kind, rate, 10, 900, name)) for name in CHOICES]
    return [*runs, virtual_time.run(lambda: steady(kind, rate, 10, 900, "cost", sessions=True))]


def cells(replicas: int, routers: int = 1, seed: int = 1) -> Steady:
    """A cell of so many replicas, each with the same load. A great one is run for a short while, too short for second
    turns."""
    seconds = 600.0 if replicas <= 10 else 240.0 if replicas <= 100 else 40.0
    kind = KINDS["conversation"]
    return virtual_time.run(lambda: steady(kind, 0.14 * replicas, replicas, seconds, "cost", routers, seed=seed))


class Shared(NamedTuple):
    """What two API keys get: one with conversations, one with bursts of long prompts."""

    max_ongoing: int
    max_queued: int
    chat: Percentiles | None
    code: Percentiles | None
    refused: int
    tokens_a_s: float


def shared(max_ongoing: int, max_queued: int) -> Shared:
    """Ten replicas."""

    async def main() -> Shared:
        cell = Cell(model_config(max_ongoing=max_ongoing, max_queued=max_queued), ZEN5, Cheapest, 10)
        loop = asyncio.get_running_loop()
        chat, code = trace(KINDS["conversation"], 0.5, 900, 1), trace(KINDS["code"], 0.4, 900, 2)
        await cell.ask_all(mixed({"chat": chat, "code": code}))
        cell.stop()
        waits: dict[str, list[float]] = {"chat": [], "code": []}
        for each in cell.outcomes:
            if each.first is not None:
                waits[each.ask.client].append(each.first - each.came)
        refused = sum(each.kind == "refused" for each in cell.outcomes)
        done = sum(each.ask.prompt_tokens + each.tokens for each in cell.outcomes if each.kind == "done")
        each_of = percentiles(waits["chat"]), percentiles(waits["code"])
        return Shared(max_ongoing, max_queued, *each_of, refused, done / loop.time())

    return virtual_time.run(main)


class ChoiceCost(NamedTuple):
    replicas: int
    choice: str
    milliseconds: float


def choice_cost(replicas: int, choice: str, choices: int = 100) -> ChoiceCost:
    """Of a real core, a choice among so many replicas, each of which has some completions."""

    async def main() -> float:
        cell = Cell(model_config(), ZEN5, CHOICES[choice], replicas)
        asks = trace(KINDS["conversation"], 20.0, 20, 1)[: 2 * choices]
        asked = [asyncio.ensure_future(cell.ask(ask)) for ask in asks]
        await asyncio.sleep(0.001)
        chosen = asks[:choices]
        before, counted = cell.models[0].choosing_s, cell.models[0].choices
        again = [asyncio.ensure_future(cell.ask(ask)) for ask in chosen]
        await asyncio.sleep(0.001)
        spent = cell.models[0].choosing_s - before
        made = cell.models[0].choices - counted
        for task in (*asked, *again):
            task.cancel()
        await asyncio.gather(*asked, *again, return_exceptions=True)
        cell.stop()
        return 1000 * spent / made

    return ChoiceCost(replicas, choice, virtual_time.run(main))


class Scaled(NamedTuple):
    """`first_token_after`: of those that came within two minutes of the step up."""

    kind: str
    policy: str
    start_s: float
    figures: RunFigures
    first_token_after: Percentiles | None
    lags: list[Lag]
    most: int
    changes: int
    history: History
    outcomes: Sequence[Outcome]


# Requests a second, and for how many seconds each.
STEPS = {"conversation": [(0.6, 300.0), (2.4, 600.0), (0.6, 600.0)], "code": [(1.0, 900.0)]}
POLICIES: dict[str, Callable[[ModelConfig], Any]] = {
    "Serve's own, 16": lambda config: ServeDefault(4, 40, 16.0),
    "nibble's, 16": lambda config: ByLoad(config, 4, 40, 16.0),
    "nibble's, 8": lambda config: ByLoad(config, 4, 40, 8.0),
    "nibble's, 4": lambda config: ByLoad(config, 4, 40, 4.0),
    "nibble's, 2": lambda config: ByLoad(config, 4, 40, 2.0),
}


def scale(kind: str, policy: str, start_s: float = START_S, max_queued: int = 64) -> Scaled:
    """From 4 to 40 replicas."""

    async def start(number: int) -> None:
        await asyncio.sleep(start_s)

    async def main() -> Scaled:
        config = model_config(max_queued=max_queued)
        cell = Cell(config, ZEN5, Cheapest, 4, policy=POLICIES[policy](config), start=start)
        steps = STEPS[kind]
        await cell.ask_all(steps_of(KINDS[kind], steps, seed=1))
        cell.stop()
        stepped = steps[0][1] if len(steps) > 1 else 0.0
        waits = [
            each.first - each.came
            for each in cell.outcomes
            if each.first is not None and stepped <= each.came < stepped + 120
        ]
        changes = sum(one[1] != other[1] for one, other in zip(cell.history, cell.history[1:], strict=False))
        most = max(row[2] for row in cell.history)
        lags = scale_up_lags(cell.history)
        history, outcomes = cell.history, cell.outcomes
        return Scaled(
            kind, policy, start_s, figures_of(cell), percentiles(waits), lags, most, changes, history, outcomes
        )

    return virtual_time.run(main)


class Fetched(NamedTuple):
    """Seconds until the first, half, and all nodes have the artifact; `durable_bytes`: read of the durable store."""

    way: str
    nodes: int
    first: float
    half: float
    all: float
    durable_bytes: float


WAYS = ("object store, all begin with the same chunk", "object store", "each from the durable store")


def fetch(way: str, nodes: int, durable: float = 10 * GBIT, link: float = 10 * GBIT) -> Fetched:
    async def main() -> Fetched:
        store = ObjectStore(ARTIFACT_BYTES, durable, link, Random(1), in_order=way == WAYS[0])
        ends = sorted(await herd(store, range(1, nodes + 1), alone=way == WAYS[2]))
        return Fetched(way, nodes, ends[0], ends[len(ends) // 2], ends[-1], store.durable.sent)

    return virtual_time.run(main)
