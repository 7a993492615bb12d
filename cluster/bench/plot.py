"""A benchmark's figure, by matplotlib: throughput and waiting against load, one line a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.bench.figures import Level, spreads
from cluster.bench.load_records import LoadSettings
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
# Okabe and Ito's, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOADS = {"concurrency": "concurrent requests", "rate": "requests sent a second"}
PANELS = (
    ("Throughput", "output tokens/s", 1.0, (("output_tokens_per_s", "-"),)),
    ("Time to first token", "ms", 1e3, (("ttft_p50_s", "-"), ("ttft_p95_s", "--"))),
    ("Time per output token", "ms", 1e3, (("tpot_p50_s", "-"), ("tpot_p95_s", "--"))),
)


def check_plot(file: Path) -> None:
    """Before anything is measured. Raises ConfigError where the figure could not be made."""
    if file.suffix not in FORMATS:
        raise ConfigError(f"plot: found {file.name!r}, allowed are names that end in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plot: needs matplotlib; pip install 'nibble-serve[bench]'") from None


def plot(levels: list[Level], settings: LoadSettings, file: Path) -> None:
    """A row of panels for each kind of load; PNG or SVG by the file's name."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in LOADS if any(level.load.kind == kind for level in levels)]
    figure = Figure(figsize=(12, 0.9 + 3.6 * len(kinds)), dpi=150, layout="constrained")
    grid = figure.subplots(len(kinds), len(PANELS), squeeze=False)
    for kind, row in zip(kinds, grid, strict=True):
        for axes, panel in zip(row, PANELS, strict=True):
            draw(axes, panel, sorted_levels(levels, kind), settings)
            axes.set_xlabel(LOADS[kind])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2), frameon=False)
    figure.savefig(file)


def sorted_levels(levels: list[Level], kind: str) -> list[Level]:
    return sorted((level for level in levels if level.load.kind == kind), key=lambda level: level.load.value)


def draw(axes: Axes, panel: Any, levels: list[Level], settings: LoadSettings) -> None:
    """Medians over rounds; bars on the solid curve reach from the least to the greatest."""
    title, unit, scale, curves = panel
    for place, server in enumerate(settings.servers):
        colour = COLOURS[place % len(COLOURS)]
        found = [(level.load.value, spreads(level.runs[place])) for level in levels]
        for figure, style in curves:
            points = [(x, figures[figure]) for x, figures in found if figure in figures]
            x, y = [x for x, _ in points], [spread.median * scale for _, spread in points]
            if style == "--":
                axes.plot(x, y, style, color=colour, linewidth=1.2)
                continue
            below = [(spread.median - spread.low) * scale for _, spread in points]
            above = [(spread.high - spread.median) * scale for _, spread in points]
            axes.errorbar(x, y, (below, above), color=colour, marker="o", markersize=4, capsize=3, label=str(server))
    axes.set_title(title if len(curves) == 1 else f"{title} (solid p50, dashed p95)", fontsize=10)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.set_xticks([level.load.value for level in levels], [f"{level.load.value:g}" for level in levels])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
