"""What a run of the simulation gave, as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.bench.figures import percentile
from tests.bench.simulation.cell import Cell, Outcome


class Percentiles(NamedTuple):
    p50: float
    p90: float
    p99: float

    def __str__(self) -> str:
        return " / ".join(f"{each:.3g}" for each in self)


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """None where there are none."""
    ordered = sorted(values)
    return Percentiles(*(percentile(ordered, each) for each in (50, 90, 99))) if ordered else None


def weighted_percentile(weights: Mapping[int, float], percent: float) -> float:
    """Of values that come so many times each."""
    left = sum(weights.values()) * percent / 100
    for value in sorted(weights):
        left -= weights[value]
        if left <= 0:
            return value
    return 0.0


class RunFigures(NamedTuple):
    """`first_token`: seconds from the arrival, the wait included; `gap_ms`: between tokens; `cost`: seconds of replicas
    a thousand generated tokens; `busy`: the part of the replicas' time in which they computed; `cached`: the part of
    the prompts' tokens that were in a replica's cache; `choice_ms`: of a real core, a choice of a replica."""

    asked: int
    kinds: Counter[str]
    first_token: Percentiles | None
    gap_ms: Percentiles
    replica_hours: float
    cost: float
    busy: float
    cached: float
    choice_ms: float

    @property
    def refused(self) -> float:
        return (self.kinds["refused"] + self.kinds["late"]) / self.asked if self.asked else 0.0


def figures_of(cell: Cell, outcomes: Sequence[Outcome] | None = None) -> RunFigures:
    """`outcomes`: of all, those to count."""
    outcomes = cell.outcomes if outcomes is None else outcomes
    gaps: Counter[int] = Counter()
    for replica in cell.replicas.values():
        for gap, tokens in replica.engine.gaps.items():
            gaps[gap] += tokens  # type: ignore[assignment]
    served = [each for each in outcomes if each.first is not None]
    seconds = cell.replica_seconds()
    generated = sum(each.ask.completion_tokens for each in cell.outcomes if each.kind == "done")
    prompts = sum(each.ask.prompt_tokens for each in served)
    return RunFigures(
        asked=len(outcomes),
        kinds=Counter(each.kind for each in outcomes),
        first_token=percentiles(each.first - each.came for each in served if each.first is not None),
        gap_ms=Percentiles(*(weighted_percentile(gaps, each) for each in (50, 90, 99))),
        replica_hours=seconds / 3600,
        cost=1000 * seconds / generated if generated else float("inf"),
        busy=sum(each.engine.busy_s for each in cell.replicas.values()) / seconds if seconds else 0.0,
        cached=sum(each.cached for each in served) / prompts if prompts else 0.0,
        choice_ms=1000 * sum(m.choosing_s for m in cell.models) / max(1, sum(m.choices for m in cell.models)),
    )


class Lag(NamedTuple):
    """`at`: when more replicas were wanted; `seconds`: until so many were ready."""

    at: float
    wanted: int
    seconds: float


def scale_up_lags(history: Sequence[tuple[float, int, int, int, int]]) -> list[Lag]:
    """One for each increase of the wanted number; none for what was not reached, or no longer wanted before it was."""
    found, before = [], history[0][1] if history else 0
    for place, (at, wanted, *_) in enumerate(history):
        if wanted > before:
            for later, still, ready, *_ in history[place:]:
                if still < wanted:
                    break
                if ready >= wanted:
                    found.append(Lag(at, wanted, later - at))
                    break
        before = wanted
    return found
