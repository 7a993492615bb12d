"""How many replicas a model needs: a pure function of its load, the replicas' measured rate and their start-up time.

Up at once, by the larger of two needs:

- steady: the running completions, averaged over about two start-ups, at `target_ongoing` a replica;
- burst: the replicas that finish the queued tokens within one start-up. A queue that the present replicas finish before
  a further one could run starts none.

Down after `downscale_delay_s` in which fewer replicas were enough all along, for the average and for what ran at each
moment, to the most that was needed in that time, and only where those have room left (`DOWN_LOAD`). To zero after
`downscale_to_zero_delay_s` without a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

# Seconds. Of a model's start-up before one was measured, and the bounds of what is measured.
STARTUP_S = 15.0
LEAST_STARTUP_S, LONGEST_STARTUP_S = 5.0, 600.0
# Seconds. The load is averaged over no longer than this, however long a start takes.
LONGEST_AVERAGE_S = 60.0
# Replicas that stay are to be loaded no higher than this part of `target_ongoing`: else the next moment wants one more.
DOWN_LOAD = 0.8


class ModelLoad(NamedTuple):
    """Of one model, at one router or at all of them. `running`: completions at the replicas; `queued`: those that wait,
    of `queued_tokens` estimated tokens. `tokens_per_s`: of one running completion, measured; None before any has ended.
    `idle_s`: seconds since the last request, of any kind; 0 while there are some."""

    running: int = 0
    queued: int = 0
    queued_tokens: int = 0
    tokens_per_s: float | None = None
    idle_s: float = math.inf


def of_all(loads: Iterable[ModelLoad]) -> ModelLoad:
    """What the routers have together; the rate is the mean of those that know one."""
    loads = list(loads)
    rates = [load.tokens_per_s for load in loads if load.tokens_per_s is not None]
    return ModelLoad(
        sum(load.running for load in loads),
        sum(load.queued for load in loads),
        sum(load.queued_tokens for load in loads),
        sum(rates) / len(rates) if rates else None,
        min((load.idle_s for load in loads), default=math.inf),
    )


class ScalingRules(NamedTuple):
    """Of one model. `target_ongoing`: completions that a replica is to run; `max_ongoing`: that it can."""

    min: int
    max: int
    target_ongoing: float
    max_ongoing: int
    downscale_delay_s: float
    downscale_to_zero_delay_s: float


class ScalingState(NamedTuple):
    """What one decision leaves to the next. `average`: of the running completions; `at`: when it was taken.
    `below_since`: since when fewer replicas have been enough, `most_below` of them at most."""

    at: float | None = None
    average: float = 0.0
    below_since: float | None = None
    most_below: int = 0


class Decision(NamedTuple):
    replicas: int
    state: ScalingState


def decide(
    load: ModelLoad, replicas: int, rules: ScalingRules, startup_s: float, state: ScalingState, now: float
) -> Decision:
    """The number of replicas from now on. `replicas`: that there are or that start. `startup_s`: what one takes from
    the decision until it is ready. `now`: seconds of any clock."""
    average = averaged(load.running, startup_s, state, now)
    steady = ScalingState(now, average)
    replicas = clamp(replicas, rules)
    burst = replicas_for_queue(load, replicas, rules, startup_s)
    if load.running or load.queued:
        up = clamp(max(1, burst, math.ceil(average / rules.target_ongoing)), rules)
        if up > replicas:
            return Decision(up, steady)
    idle = load.idle_s >= rules.downscale_to_zero_delay_s
    # The average lags after a burst has started replicas: what runs now keeps them until it has caught up.
    busy = math.ceil(max(average, load.running) / (DOWN_LOAD * rules.target_ongoing))
    down = clamp(0 if idle else max(1, burst, busy), rules)
    if down == 0 and replicas == 1:
        return Decision(0, steady)
    if down >= replicas:
        return Decision(replicas, steady)
    since = now if state.below_since is None else state.below_since
    most = down if state.below_since is None else max(down, state.most_below)
    if now - since < rules.downscale_delay_s:
        return Decision(replicas, steady._replace(below_since=since, most_below=most))
    return Decision(clamp(most, rules), steady)


def averaged(running: int, startup_s: float, state: ScalingState, now: float) -> float:
    """The exponential moving average of the running completions, with two start-ups as its time constant."""
    passed = 0.0 if state.at is None else max(0.0, now - state.at)
    kept = math.exp(-passed / min(max(2 * startup_s, LEAST_STARTUP_S), LONGEST_AVERAGE_S))
    return state.average * kept + running * (1 - kept)


def replicas_for_queue(load: ModelLoad, replicas: int, rules: ScalingRules, startup_s: float) -> int:
    """As many as finish the queue within one start-up, but no more than one for each completion that waits beside those
    that there are. While no rate is known: as many as hold all completions at once."""
    if not load.queued:
        return 0
    if not load.tokens_per_s:
        return math.ceil((load.running + load.queued) / rules.max_ongoing)
    needed = math.ceil(load.queued_tokens / (load.tokens_per_s * rules.max_ongoing * startup_s))
    return min(needed, replicas + load.queued)


def clamp(replicas: int, rules: ScalingRules) -> int:
    return max(rules.min, min(rules.max, replicas))


class StartupTime:
    """Seconds from a decision to start replicas until they are ready, as measured: on this cluster, with its nodes'
    caches as they are, and with the wait for a node where there was one."""

    def __init__(self) -> None:
        self.seconds = STARTUP_S
        self._wanted = 0
        self._since: float | None = None  # while replicas start

    def note(self, running: int, wanted: int, now: float) -> None:
        """To be called at each decision. `wanted`: replicas, those that run included."""
        if self._since is not None and running >= self._wanted:
            measured = min(max(now - self._since, LEAST_STARTUP_S), LONGEST_STARTUP_S)
            self.seconds = (self.seconds + measured) / 2
            self._since = None
        if wanted <= running:
            self._since = None
        elif self._since is None or wanted < self._wanted:
            self._since, self._wanted = now, wanted
