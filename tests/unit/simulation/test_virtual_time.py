"""Time that jumps from timer to timer: in order, and for every clock that the product's code reads."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.bench.simulation import virtual_time


def test_an_hour_passes_at_once_on_every_clock() -> None:
    async def main() -> tuple[float, float, float]:
        begun = time.monotonic(), time.time(), asyncio.get_running_loop().time()
        await asyncio.sleep(3600)
        return (
            time.monotonic() - begun[0],
            time.time() - begun[1],
            asyncio.get_running_loop().time() - begun[2],
        )

    clock = time.perf_counter()
    assert virtual_time.run(main) == pytest.approx((3600, 3600, 3600))
    assert time.perf_counter() - clock < 3600


def test_clocks_are_real_again_afterwards_also_after_an_error() -> None:
    async def main() -> None:
        await asyncio.sleep(3600)
        raise ValueError

    before = time.monotonic()
    with pytest.raises(ValueError):  # noqa: PT011 - its own
        virtual_time.run(main)
    assert before <= time.monotonic() < before + 3600


def test_timers_run_in_the_order_of_their_times() -> None:
    seen: list[tuple[float, str]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for at, name in ((2.0, "d"), (0.5, "a"), (1.5, "c"), (1.0, "b")):
            loop.call_at(at, lambda name=name: seen.append((loop.time(), name)))
        await asyncio.sleep(3)

    virtual_time.run(main)
    assert seen == [(0.5, "a"), (1.0, "b"), (1.5, "c"), (2.0, "d")]


def test_what_is_ready_runs_before_time_passes() -> None:
    async def main() -> list[float]:
        times = []
        for _ in range(100):
            await asyncio.sleep(0)
            times.append(time.monotonic())
        return times

    assert virtual_time.run(main) == [0.0] * 100


def test_what_waits_for_nothing_is_told_instead_of_hanging() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="no timer is set"):
        virtual_time.run(main)


def test_tasks_that_are_left_are_cancelled() -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append(True)

    async def main() -> None:
        main.task = asyncio.ensure_future(forever())  # type: ignore[attr-defined]
        await asyncio.sleep(1)

    virtual_time.run(main)
    assert ended == [True]
