"""The figures of a run, their medians over rounds and their ratios: pure functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.bench.load_records import Load, LoadSettings, Run, Sent

PERCENTS = (50, 95, 99)

# Over all requests of a run that succeeded, in seconds.
DISTRIBUTIONS: dict[str, Callable[[Sent], list[float]]] = {
    "ttft": lambda sent: [sent.first_token_s],
    "tpot": lambda sent: [] if sent.token_s is None else [sent.token_s],
    "gap": lambda sent: sent.gaps_s,
    "latency": lambda sent: [sent.latency_s],
}


@dataclass(frozen=True)
class Spread:
    """Over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Level:
    """One load: the runs of each server, by its place in the settings, in the order of their rounds."""

    load: Load
    runs: tuple[tuple[Run, ...], ...]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, at least one; between two of them on a straight line (numpy's default)."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def figures_of(run: Run) -> dict[str, float]:
    """By name; what cannot be told, such as a time where nothing succeeded, is left out. Requests that failed count in
    no figure: `errors_of` has them."""
    good = run.succeeded
    found: dict[str, float] = {}
    tokens = sum(sent.tokens for sent in good)
    if run.seconds > 0:
        found["output_tokens_per_s"] = tokens / run.seconds
        found["requests_per_s"] = len(good) / run.seconds
    for name, values_of in DISTRIBUTIONS.items():
        ordered = sorted(value for sent in good for value in values_of(sent))
        if ordered:
            found |= {f"{name}_p{percent}_s": percentile(ordered, percent) for percent in PERCENTS}
            found[f"{name}_mean_s"] = statistics.fmean(ordered)
    if good:
        found["output_tokens"] = statistics.fmean(sent.tokens for sent in good)
    told = [sent.reply.prompt_tokens for sent in good if sent.reply.prompt_tokens is not None]
    if told:
        found["prompt_tokens"] = statistics.fmean(told)
    if run.requests:
        found["sent_late_p99_s"] = percentile(sorted(sent.sent - sent.due for sent in run.requests), 99)
    if tokens:
        found["generator_cpu_s_per_token"] = run.cpu_s / tokens
    return found


def errors_of(runs: Iterable[Run]) -> Counter[str]:
    """How often each was met, by status and message."""
    return Counter(str(sent.reply.failure) for run in runs for sent in run.requests if sent.reply.failure)


def counted_by(runs: Iterable[Run]) -> str:
    """What told the number of output tokens."""
    told = {sent.reply.completion_tokens is not None for run in runs for sent in run.succeeded}
    return {(True,): "usage", (False,): "chunks", (False, True): "usage and chunks"}.get(tuple(sorted(told)), "nothing")


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there are none."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def spreads(runs: Iterable[Run]) -> dict[str, Spread]:
    found = [figures_of(run) for run in runs]
    names = dict.fromkeys(name for figures in found for name in figures)
    return {name: value for name in names if (value := spread(figures.get(name) for figures in found)) is not None}


def ratios(runs: Iterable[Run], baseline: Iterable[Run]) -> dict[str, Spread]:
    """Of each figure, round by round: the two were measured one after the other, so that what else the machine did
    cancels out."""
    others = {run.round: figures_of(run) for run in baseline}
    pairs = [(figures_of(run), others[run.round]) for run in runs if run.round in others]
    names = dict.fromkeys(name for ours, _ in pairs for name in ours)
    quotients = {
        name: spread(ours[name] / theirs[name] for ours, theirs in pairs if name in ours and theirs.get(name))
        for name in names
    }
    return {name: value for name, value in quotients.items() if value is not None}


def levels_of(runs: Sequence[Run], settings: LoadSettings) -> list[Level]:
    """Of the loads that were begun. A run that was interrupted counts only where its server has no other."""
    found = []
    for load in settings.loads:
        servers = []
        for place in range(len(settings.servers)):
            own = [run for run in runs if run.load == load and run.server == place]
            servers.append(tuple([run for run in own if run.ending != "interrupted"] or own))
        if any(servers):
            found.append(Level(load, tuple(servers)))
    return found
