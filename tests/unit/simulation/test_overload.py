"""The simulation of `tests/bench/overload.py` beside what was measured (docs/performance.md): whether the simulator
as a whole does as the product does."""

from __future__ import annotations

import pytest

from tests.bench.simulation import virtual_time
from tests.bench.simulation.overload import overload


def test_three_times_the_capacity_is_served_shared_and_refused_as_measured() -> None:
    found = virtual_time.run(lambda: overload(326, times=3, seconds=120, leave=0.5))
    assert found.goodput / 326 == pytest.approx(0.90, abs=0.1)
    assert found.kinds["heavy"]["done"] == pytest.approx(98, rel=0.1)
    assert found.kinds["heavy"]["refused"] == pytest.approx(521, rel=0.1)
    assert found.kinds["light"]["done"] == pytest.approx(58, rel=0.15)
    assert found.kinds["light"]["refused"] == 0
    assert found.told == pytest.approx(13, rel=0.15)
    assert found.met == pytest.approx(13.6, rel=0.15)
    assert found.within >= 0.9


def test_keys_that_both_have_work_get_equal_shares_as_measured() -> None:
    found = virtual_time.run(lambda: overload(317, times=4.5, seconds=60, leave=0.0))
    assert found.given["light"] / found.given["heavy"] == pytest.approx(6007 / 5979, rel=0.1)
    assert found.kinds["light"]["refused"] == pytest.approx(40, rel=0.2)
    assert found.told == pytest.approx(10, rel=0.15)
