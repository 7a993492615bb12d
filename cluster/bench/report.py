"""What a benchmark found, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from cluster.bench.figures import PERCENTS, Level, Spread, counted_by, errors_of, levels_of, ratios, spreads
from cluster.bench.load_records import LoadSettings, Run

MAX_ERRORS = 5  # kinds shown of a server under one load
# The median count of output tokens may miss what was asked for by rounding, not by more.
SHORT = 0.99


class Row(NamedTuple):
    figure: str
    label: str
    scale: float = 1.0


ROWS = (
    Row("output_tokens_per_s", "output tokens/s"),
    Row("requests_per_s", "requests/s"),
    *(
        Row(f"{name}_p{percent}_s", f"{label}, p{percent} ms", 1e3)
        for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("gap", "gap"), ("latency", "latency"))
        for percent in PERCENTS
    ),
    Row("prompt_tokens", "prompt tokens"),
    Row("output_tokens", "output tokens"),
)
SECTION_ENDS = ("requests_per_s", "ttft_p99_s", "tpot_p99_s", "gap_p99_s", "latency_p99_s")
RATIOS = tuple(row.figure for row in ROWS if not row.figure.endswith("_tokens"))


def show(runs: list[Run], settings: LoadSettings, console: Console) -> None:
    for server in settings.servers:
        console.print(str(server))
    for level in levels_of(runs, settings):
        console.print(level_table(level, settings))
        for line in remarks(level, settings):
            console.print(line)


def level_table(level: Level, settings: LoadSettings) -> Table:
    """Medians over rounds with the least and the greatest; of ratios too, each of two runs of the same round."""
    labels = [server.label for server in settings.servers]
    others = [] if settings.baseline is None else [n for n in range(len(labels)) if n != settings.baseline]
    headings = [*labels, *(f"{labels[place]}/{labels[settings.baseline or 0]}" for place in others)]
    columns = (Column(heading, justify="right") for heading in headings)
    table = Table(Column("", no_wrap=True), *columns, title=str(level.load).capitalize(), title_justify="left")
    found = [spreads(runs) for runs in level.runs]
    compared = [ratios(level.runs[place], level.runs[settings.baseline or 0]) for place in others]
    for row in ROWS:
        cells = [written(figures.get(row.figure), row.scale) for figures in found]
        cells += [written(quotients.get(row.figure)) if row.figure in RATIOS else "" for quotients in compared]
        if any(cells):
            table.add_row(row.label, *cells, end_section=row.figure in SECTION_ENDS)
    return table


def written(spread: Spread | None, scale: float = 1.0) -> str:
    if spread is None:
        return ""
    median, low, high = (number(value * scale) for value in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}-{high})"


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def remarks(level: Level, settings: LoadSettings) -> Iterator[str]:
    """What the table's figures do not say."""
    for server, runs in zip(settings.servers, level.runs, strict=True):
        figures = spreads(runs)
        errors = errors_of(runs)
        sent = sum(len(run.requests) for run in runs)
        if runs:
            failed = f"{errors.total()} of {sent} requests failed" if errors else f"{sent} requests, no errors"
            yield f"{server.label}: {failed}; output tokens counted by {counted_by(runs)}"
        for error, times in errors.most_common(MAX_ERRORS):
            yield f"{server.label}: {times} x {error}"
        if len(errors) > MAX_ERRORS:
            yield f"{server.label}: {len(errors) - MAX_ERRORS} more kinds of error; --json has them all"
        if "output_tokens" in figures and figures["output_tokens"].median < SHORT * settings.output_tokens:
            yield f"{server.label}: completions are shorter than the {settings.output_tokens} tokens asked for"
        if "generator_cpu_s_per_token" in figures:
            used = figures["generator_cpu_s_per_token"].median * 1e6
            late = figures["sent_late_p99_s"].high * 1e3
            yield f"{server.label}: the load generator used {used:.0f} us of CPU a token" + (
                f" and sent up to {late:.1f} ms late (p99)" if level.load.kind == "rate" else ""
            )
        for run in runs:
            if run.ending != "whole":
                yield f"{server.label}: round {run.round + 1} ended early: {run.ending}"
