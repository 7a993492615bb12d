"""Runs scenarios and prints their figures as tables; with `--figures` it draws them, too."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.simulation import plots, scenarios, virtual_time
from tests.bench.simulation.overload import overload
from tests.bench.simulation.scenarios import POLICIES, WAYS, Scaled, Steady

REPLICAS = (10, 100, 500, 1000)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row) + " |")


def table_of(runs: Sequence[Steady]) -> None:
    head = "trace", "choice", "replicas", "routers", "requests/s", "first token, s", "gap, ms", "refused"
    table(
        (*head, "busy", "prompt cached", "ongoing", "longest queue"),
        [
            (
                *(run.kind, run.choice, run.replicas, run.routers, run.rate, run.figures.first_token),
                *(run.figures.gap_ms, run.figures.refused, run.figures.busy, run.figures.cached),
                *(run.ongoing, run.longest_queue),
            )
            for run in runs
        ],
    )


def run_overload(figures: Path | None) -> None:
    runs = [(326.0, 3.0, 120.0, 0.5), (317.0, 4.5, 60.0, 0.0)]
    for rate, times, seconds, leave in runs:
        found = virtual_time.run(lambda: overload(rate, times, seconds, leave))  # noqa: B023 - run at once
        print(f"{times:g} times {rate:g} tokens/s, {leave:.0%} leave: {found}")


def run_load(figures: Path | None) -> None:
    runs = [*scenarios.load("conversation"), *scenarios.load("code")]
    table_of(runs)
    if figures:
        plots.draw_load(runs, figures / "load.svg")


def run_routing(figures: Path | None) -> None:
    table_of(scenarios.routing())


def run_cells(figures: Path | None) -> None:
    table_of([scenarios.cells(replicas) for replicas in REPLICAS[:2]])


def run_many_cells(figures: Path | None) -> None:
    """5,000 replicas as ten cells of 500, each behind four routers."""
    table_of([scenarios.cells(500, routers=4, seed=seed) for seed in range(10)])


def run_shares(figures: Path | None) -> None:
    runs = [
        scenarios.shared(ongoing, queued) for ongoing, queued in ((32, 64), (16, 640), (8, 640), (4, 640), (2, 640))
    ]
    head = "max_ongoing", "max_queued", "chat: first token, s", "code: first token, s", "refused", "tokens/s"
    table(head, runs)


def run_scale(figures: Path | None) -> None:
    runs = [scenarios.scale("conversation", policy) for policy in POLICIES]
    table_of_scaled(runs)
    if figures:
        plots.draw_scale(runs, figures / "policies.svg")


def run_bursts(figures: Path | None) -> None:
    table_of_scaled([scenarios.scale("code", policy) for policy in POLICIES])


def run_start(figures: Path | None) -> None:
    """What a faster start gives."""
    table_of_scaled([scenarios.scale("conversation", "nibble's, 4", start_s) for start_s in (4.0, 11.0, 40.0)])


def table_of_scaled(runs: Sequence[Scaled]) -> None:
    head = "trace", "policy", "start, s", "first token, s", "in the 2 min after the step", "refused", "replica-hours"
    table(
        (*head, "busy", "most replicas", "changes", "lag of a change, s"),
        [
            (
                *(run.kind, run.policy, run.start_s, run.figures.first_token, run.first_token_after),
                *(run.figures.refused, run.figures.replica_hours, run.figures.busy, run.most, run.changes),
                max((lag.seconds for lag in run.lags), default=0.0),
            )
            for run in runs
        ],
    )


def run_choice(figures: Path | None) -> None:
    costs = [scenarios.choice_cost(replicas, choice) for choice in scenarios.CHOICES for replicas in REPLICAS]
    table(("replicas", "choice", "ms of a core"), costs)
    if figures:
        plots.draw_choice(costs, figures / "choice.svg")


def run_fetch(figures: Path | None) -> None:
    fetches = [scenarios.fetch(way, nodes) for way in WAYS for nodes in REPLICAS]
    table(("way", "nodes", "first, s", "half, s", "all, s", "bytes from the durable store"), fetches)
    if figures:
        plots.draw_fetch(fetches, figures / "fetch.svg")


SCENARIOS: dict[str, Callable[[Path | None], None]] = {
    "overload": run_overload,
    "load": run_load,
    "routing": run_routing,
    "cells": run_cells,
    "many-cells": run_many_cells,
    "shares": run_shares,
    "scale": run_scale,
    "bursts": run_bursts,
    "start": run_start,
    "choice": run_choice,
    "fetch": run_fetch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--figures", type=Path, help="a folder for SVG files")
    arguments = parser.parse_args()
    for name in arguments.scenarios:
        begun = time.process_time()
        print(f"\n{name}")
        SCENARIOS[name](arguments.figures)
        print(f"{time.process_time() - begun:.0f} s of a core", flush=True)


if __name__ == "__main__":
    main()
