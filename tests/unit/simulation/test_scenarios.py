"""Scenarios run, give the same figures each time, and can be drawn and printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.simulation import __main__ as printed
from tests.bench.simulation import plots, scenarios, virtual_time
from tests.bench.simulation.traces import CONVERSATION


def steady(choice: str, seconds: float = 120) -> scenarios.Steady:
    return virtual_time.run(lambda: scenarios.steady(CONVERSATION, 0.6, 8, seconds, choice))


def test_the_same_scenario_gives_the_same_figures() -> None:
    runs = [steady("cost") for _ in range(2)]
    runs = [run._replace(figures=run.figures._replace(choice_ms=0.0)) for run in runs]  # that is of the real clock
    assert runs[0] == runs[1]
    assert runs[0].figures.kinds["done"] == runs[0].figures.asked > 10
    assert 0 < runs[0].ongoing < 32


def test_routing_by_cost_finds_more_of_the_prompts_in_caches_than_a_blind_choice() -> None:
    assert steady("cost", 600).figures.cached > 2 * steady("power of two", 600).figures.cached


def test_nibble_s_policy_follows_a_step_up_and_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scenarios.STEPS, "conversation", [(0.3, 60.0), (1.5, 120.0), (0.1, 400.0)])
    run = scenarios.scale("conversation", "nibble's, 4")
    assert run.figures.kinds == {"done": run.figures.asked}
    wanted = [row[1] for row in run.history]
    assert max(wanted) > wanted[0] == 4
    assert wanted[-1] < max(wanted)
    assert run.lags
    assert all(scenarios.START_S <= lag.seconds <= scenarios.START_S + 1 for lag in run.lags)
    assert run.figures.replica_hours * 3600 < max(wanted) * run.history[-1][0]


def test_nodes_that_begin_with_different_chunks_help_each_other() -> None:
    in_order, from_anywhere, alone = (scenarios.fetch(way, 30) for way in scenarios.WAYS)
    assert from_anywhere.all < in_order.all / 2
    assert alone.durable_bytes == pytest.approx(30 * in_order.durable_bytes)


def test_figures_are_drawn_the_same_each_time_and_tables_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetches = [scenarios.fetch(way, nodes) for way in scenarios.WAYS for nodes in (2, 4)]
    for name in ("one.svg", "other.svg"):
        plots.draw_fetch(fetches, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    printed.table(("way", "seconds"), [("a", 1.2345), ("b", 2)])
    assert capsys.readouterr().out.splitlines() == ["| way | seconds |", "| --- | --- |", "| a | 1.23 |", "| b | 2 |"]
