"""Figures of docs/scaling.md, by matplotlib: small SVG files that are the same for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cluster.bench.plot import COLOURS
from tests.bench.simulation.scenarios import ChoiceCost, Fetched, Scaled, Steady

# In these figures alone: other modules of the process draw, too.
styled = matplotlib.rc_context({"svg.hashsalt": "nibble", "svg.fonttype": "none", "font.size": 9})


def panels(count: int) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(5 * count, 3.4), layout="constrained")
    row = figure.subplots(1, count, squeeze=False)[0]
    for axes in row:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


@styled
def draw_load(runs: Sequence[Steady], file: Path) -> None:
    figure, (waits, ongoing) = panels(2)
    for colour, kind in zip(COLOURS, dict.fromkeys(run.kind for run in runs), strict=False):
        own = [run for run in runs if run.kind == kind]
        x = [run.rate / run.replicas for run in own]
        for place, style in enumerate(("-", "--")):
            y = [run.figures.first_token[place] if run.figures.first_token else 0.0 for run in own]
            waits.plot(x, y, style, marker="o", markersize=3, color=colour, label=f"{kind}, {('p50', 'p90')[place]}")
        ongoing.plot(x, [run.ongoing for run in own], marker="o", markersize=3, color=colour, label=kind)
    waits.set(yscale="log", ylabel="seconds to the first token")
    ongoing.set(yscale="log", ylabel="completions at a replica, mean")
    for axes in (waits, ongoing):
        axes.set_xlabel("requests a second and replica")
        axes.legend(frameon=False)
    save(figure, file)


@styled
def draw_scale(runs: Sequence[Scaled], file: Path) -> None:
    """What each policy costs and gives; and two of them over time."""
    shown = [run for run in runs if run.kind == "conversation"]
    figure, (cost, time) = panels(2)
    for colour, run in zip(COLOURS, shown, strict=False):
        assert run.figures.first_token is not None
        cost.plot(run.figures.replica_hours, run.figures.first_token.p90, "o", color=colour)
        at = run.figures.replica_hours, run.figures.first_token.p90
        cost.annotate(run.policy, at, xytext=(5, 4), textcoords="offset points")
        if run.policy in ("Serve's own, 16", "nibble's, 16", "nibble's, 4"):
            time.step([row[0] for row in run.history], [row[2] for row in run.history], color=colour, label=run.policy)
    cost.set(xlabel="hours of replicas", ylabel="seconds to the first token, p90", yscale="log")
    cost.set_yticks([10, 20, 40, 80], ["10", "20", "40", "80"], minor=False)
    cost.tick_params(which="minor", labelleft=False)
    cost.margins(x=0.15)
    time.set(xlabel="seconds", ylabel="replicas that are ready")
    time.legend(frameon=False)
    save(figure, file)


@styled
def draw_choice(costs: Sequence[ChoiceCost], file: Path) -> None:
    lines = [(cost.choice, cost.replicas, cost.milliseconds) for cost in costs]
    draw_lines(lines, file, xlabel="replicas in the cell", ylabel="milliseconds of a core, a choice")


@styled
def draw_fetch(fetches: Sequence[Fetched], file: Path) -> None:
    lines = [(fetched.way, fetched.nodes, fetched.all) for fetched in fetches]
    draw_lines(lines, file, xlabel="nodes that start at once", ylabel="seconds until the last one has it")


def draw_lines(points: Sequence[tuple[str, float, float]], file: Path, **labels: str) -> None:
    """A line for each name, both axes logarithmic. `points`: name, x, y."""
    figure, (axes,) = panels(1)
    for colour, name in zip(COLOURS, dict.fromkeys(name for name, _, _ in points), strict=False):
        x, y = zip(*((x, y) for own, x, y in points if own == name), strict=True)
        style = "--" if name.startswith("each") else "-"
        axes.plot(x, y, style, marker="o", markersize=3, color=colour, label=name)
    axes.set(xscale="log", yscale="log", **labels)
    axes.legend(frameon=False)
    save(figure, file)
