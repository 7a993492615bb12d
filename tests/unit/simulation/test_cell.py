"""A cell: every request ends in one way, replicas start and end as they are told to, and idle ones are preferred."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from cluster.model_config import ModelConfig
from tests.bench.simulation import virtual_time
from tests.bench.simulation.cell import CONTROL_S, Cell
from tests.bench.simulation.choices import Cheapest, Choice, LeastBusy, PowerOfTwo
from tests.bench.simulation.engine import ZEN5
from tests.bench.simulation.figures import figures_of, scale_up_lags, weighted_percentile
from tests.bench.simulation.scaling import ServeDefault
from tests.bench.simulation.traces import CONVERSATION, Ask, trace


def config(**queue: int) -> ModelConfig:
    given = {"name": "model", "family": "llama", "checkpoint": "builtin:llama", "engine": "openvino", "context": 8192}
    return ModelConfig.model_validate({**given, "queue": queue})


CHOICES = {
    "cheapest": Cheapest,
    "least busy": lambda cell: LeastBusy(),
    "power of two": lambda cell: PowerOfTwo(),
}


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_request_ends_and_nothing_stays_behind(choice: Callable[[Cell], Choice], routers: int) -> None:
    async def main() -> None:
        cell = Cell(config(max_ongoing=4, max_queued=8), ZEN5, choice, replicas=3, routers=routers)
        asks = trace(CONVERSATION, 2.0, 120, seed=1)
        await cell.ask_all(asks)
        cell.stop()
        kinds = Counter(each.kind for each in cell.outcomes)
        assert kinds["done"] + kinds["refused"] == len(asks)
        assert kinds["refused"], "it is more than three replicas can serve"
        for each in cell.outcomes:
            if each.kind == "done":
                assert each.first is not None
                assert each.came < each.first <= each.ended
                assert each.tokens == each.ask.completion_tokens
            else:
                assert each.retry_after
        for model in cell.models:
            model.admission.queue.check_integrity()
            assert (model.admission.queue.running, len(model.admission.queue)) == (0, 0)
        for replica in cell.replicas.values():
            replica.engine.check_integrity()
            assert replica.engine.ongoing == 0
        generated = sum(replica.engine.generated for replica in cell.replicas.values())
        assert generated == pytest.approx(sum(each.tokens for each in cell.outcomes))

    virtual_time.run(main)


def test_a_client_that_leaves_frees_its_place() -> None:
    async def main() -> None:
        cell = Cell(config(max_ongoing=1), ZEN5, lambda cell: LeastBusy(), replicas=1)
        long, short = Ask(0, "a", 1, 10, 1000, 0), Ask(0, "b", 2, 10, 2, 0)
        leaving = asyncio.ensure_future(cell.ask(long, patience=3.0))
        await asyncio.sleep(0.5)
        served, left = await cell.ask(short), await leaving
        assert (left.kind, left.ended) == ("left", 3.0)
        assert 0 < left.tokens < 1000
        assert served.first is not None
        assert 3.0 < served.first < 3.5

    virtual_time.run(main)


def test_replicas_start_after_their_time_and_end_once_they_are_empty() -> None:
    wanted = [1]

    async def start(number: int) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        cell = Cell(config(), ZEN5, lambda cell: LeastBusy(), 1, policy=lambda cell, now: wanted[0], start=start)
        wanted[0] = 3
        await asyncio.sleep(10 + 0.9 * CONTROL_S)
        assert list(cell.ready) == [0]
        await asyncio.sleep(0.2 * CONTROL_S)
        assert list(cell.ready) == [0, 1, 2]
        asked = [asyncio.ensure_future(cell.ask(Ask(0, "a", 1, 10, 200, 0))) for _ in range(3)]
        await asyncio.sleep(1)
        assert [replica.engine.ongoing for replica in cell.replicas.values()] == [1, 1, 1]
        wanted[0] = 1
        await asyncio.sleep(1)
        assert list(cell.ready) == [0]
        assert cell.replicas[2].ended_at is None, "its request is in it"
        assert Counter(each.kind for each in await asyncio.gather(*asked)) == {"done": 3}
        assert cell.replicas[2].ended_at is not None
        assert [lag.seconds for lag in scale_up_lags(cell.history)] == pytest.approx([10.0], abs=0.5)
        cell.stop()

    virtual_time.run(main)


def test_serve_s_own_policy_waits_half_a_minute_before_it_adds_replicas() -> None:
    async def start(number: int) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        cell = Cell(config(), ZEN5, lambda cell: LeastBusy(), 1, policy=ServeDefault(1, 4, target=2.0), start=start)
        asked = [asyncio.ensure_future(cell.ask(Ask(0, "a", 1, 10, 1000, 0))) for _ in range(8)]
        await asyncio.sleep(29)
        assert cell.wanted == 1
        await asyncio.sleep(3)
        assert cell.wanted == 4
        await asyncio.gather(*asked)
        assert figures_of(cell).kinds == {"done": 8}
        cell.stop()

    virtual_time.run(main)


def test_percentiles_of_values_that_come_many_times() -> None:
    assert weighted_percentile({10: 90.0, 100: 9.0, 1000: 1.0}, 50) == 10
    assert weighted_percentile({10: 90.0, 100: 9.0, 1000: 1.0}, 95) == 100
    assert weighted_percentile({10: 90.0, 100: 9.0, 1000: 1.0}, 99.5) == 1000
