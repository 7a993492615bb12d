"""When an engine says that it cannot serve any more."""

from __future__ import annotations

import pytest

from cluster.errors import EngineError
from deployments.engines.health import FAILURES, EngineHealth


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_that_takes_too_long() -> None:
    clock = Clock()
    health = EngineHealth(clock)
    health.check(5)
    health.working()
    clock.now = 4
    health.check(5)
    health.working()  # it goes on
    clock.now = 9
    health.check(5)
    clock.now = 9.5
    with pytest.raises(EngineError, match=r"longer than 5 s \(limits\.stall_s\)"):
        health.check(5)
    health.check(None)
    health.idle()
    health.check(5)


def test_several_failures_in_a_row_and_no_single_ones() -> None:
    health = EngineHealth()
    for _ in range(3 * FAILURES):
        health.failed(ValueError("one"))
        health.succeeded()
        health.check(5)
    for number in range(FAILURES):
        health.check(5)
        health.failed(ValueError(f"number {number}"))
    with pytest.raises(EngineError, match=f"{FAILURES} steps in a row have failed, the last with: number 2"):
        health.check(5)
    health.succeeded()
    health.check(5)


def test_an_engine_whose_thread_has_ended() -> None:
    health = EngineHealth()
    health.ended = RuntimeError("gone")
    with pytest.raises(EngineError, match="has ended: RuntimeError: gone"):
        health.check(None)
