"""An asyncio event loop whose time is virtual: where it would wait for the next timer, its clock jumps there.
Coroutines run unchanged, and an hour takes as long as the Python in it."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

R = TypeVar("R")


class AdvancingSelector(selectors.SelectSelector):
    """No file is ever ready; to wait is to `advance`."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Raises RuntimeError where no timer is set: nothing would ever happen again."""
        if timeout is None:
            raise RuntimeError("the simulation waits for something that nothing will bring about: no timer is set")
        self._advance(timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(AdvancingSelector(self._advance))
        self._clock_resolution = 1e-9  # timers that differ by rounding alone are due together

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._now

    def _advance(self, seconds: float) -> None:
        self._now += max(0.0, seconds)


def run(main: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """The result of `main()`, the same each time: the module `random` begins with a seed.

    Meanwhile `time.monotonic` and `time.time` are virtual, too, for what reads a clock by itself; `time.perf_counter`
    and `time.process_time` are not. Tasks that are left are cancelled."""
    loop = VirtualTimeLoop()
    random.seed(0)
    with mock.patch("time.monotonic", loop.time), mock.patch("time.time", loop.time):
        try:
            return loop.run_until_complete(main())
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
