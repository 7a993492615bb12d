"""The load of `tests/bench/overload.py`, simulated, so that what was measured can be put beside it."""

from __future__ import annotations

import asyncio
import statistics
from random import Random
from typing import NamedTuple

from cluster.model_config import ModelConfig
from tests.bench.overload import MARGIN_S, MAX_TOKENS, SHARES, SHORTEST_WAIT_S
from tests.bench.simulation.cell import Cell, Outcome
from tests.bench.simulation.choices import LeastBusy
from tests.bench.simulation.engine import StepTimes
from tests.bench.simulation.traces import Ask

PROMPT_TOKENS = 12


class OverloadFigures(NamedTuple):
    """`goodput`: tokens a second of whole answers; `given`: tokens by key, also of what left early; `within`: the part
    of the retries that were taken and met a wait within a factor of two of what they were told."""

    goodput: float
    kinds: dict[str, dict[str, int]]
    given: dict[str, int]
    told: float
    met: float
    within: float
    retries: int


def engine_of(tokens_a_second: float) -> StepTimes:
    """Engine bigdl with the built-in llama: one sequence at a time. A prompt piece takes about as long as a token."""
    step = 1 / tokens_a_second
    return StepTimes(((1, step), (64, step)), step_tokens=64, max_running=1, cache_tokens=512)


async def overload(
    tokens_a_second: float, times: float, seconds: float, leave: float, patience: float = 10.0
) -> OverloadFigures:
    queue = {"max_queued": 16}
    config = ModelConfig.model_validate(
        {"name": "llama", "family": "llama", "checkpoint": "builtin:llama", "threads": 1, "queue": queue}
    )
    cell = Cell(config, engine_of(tokens_a_second), lambda cell: LeastBusy(), replicas=1)
    loop, random = asyncio.get_running_loop(), Random(0)
    retries: list[tuple[Outcome, Outcome]] = []

    async def capacity() -> None:
        """What the model has learnt when the load begins; measured for 15 s there."""
        for _ in range(4):
            await cell.ask(Ask(0, "heavy", 0, PROMPT_TOKENS, MAX_TOKENS, 0), max_tokens=MAX_TOKENS)

    async def one(key: str, limit: float | None) -> None:
        ask = Ask(loop.time(), key, 0, PROMPT_TOKENS, MAX_TOKENS, 0)
        outcome = await cell.ask(ask, max_tokens=MAX_TOKENS, patience=limit)
        if outcome.kind == "refused":
            assert outcome.retry_after is not None, "the router tells it"
            await asyncio.sleep(outcome.retry_after)
            retries.append((outcome, await cell.ask(ask, max_tokens=MAX_TOKENS)))

    await asyncio.gather(*(capacity() for _ in range(8)))
    begun, asked = loop.time(), []
    while loop.time() - begun < seconds:
        await asyncio.sleep(random.expovariate(times * tokens_a_second / MAX_TOKENS))
        (key,) = random.choices(list(SHARES), list(SHARES.values()))
        limit = random.uniform(0, patience) if random.random() < leave else None
        asked.append(asyncio.ensure_future(one(key, limit)))
    until = loop.time()
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    counted = [each for each in cell.outcomes if begun + MARGIN_S <= each.ended <= until]
    return of_outcomes(counted, retries, until - begun - MARGIN_S)


def of_outcomes(counted: list[Outcome], retries: list[tuple[Outcome, Outcome]], span: float) -> OverloadFigures:
    by_key = {key: [each for each in counted if each.ask.client == key] for key in SHARES}
    kinds = {
        key: {kind: sum(each.kind == kind for each in found) for kind in ("done", "left", "refused")}
        for key, found in by_key.items()
    }
    met = [
        (before.retry_after, max(again.first - again.came, SHORTEST_WAIT_S))
        for before, again in retries
        if before.retry_after is not None and again.first is not None
    ]
    return OverloadFigures(
        goodput=sum(each.tokens for each in counted if each.kind == "done") / span,
        kinds=kinds,
        given={key: sum(each.tokens for each in found) for key, found in by_key.items()},
        told=statistics.median(told for told, _ in met) if met else 0.0,
        met=statistics.median(wait for _, wait in met) if met else 0.0,
        within=sum(0.5 <= told / wait <= 2 for told, wait in met) / len(met) if met else 0.0,
        retries=len(met),
    )
