"""Policies: how many replicas a cell has from now on."""

from __future__ import annotations

import math
from collections import deque

from cluster.model_config import LEAST_TO_ZERO_S, ModelConfig
from deployments.scaling import ScalingRules, ScalingState, StartupTime, decide, of_all
from tests.bench.simulation.cell import Cell


class ServeDefault:
    """Serve's own policy with Serve's defaults, which counts what the routers have sent to the replicas, and not what
    waits in their admission: the requests of the last 30 s at `target` a replica; up after 30 s in which more were
    wanted, down after 600 s."""

    LOOK_BACK_S, UP_S, DOWN_S = 30.0, 30.0, 600.0

    def __init__(self, least: int, most: int, target: float) -> None:
        self._least, self._most, self._target = least, most, target
        self._running: deque[tuple[float, int]] = deque()
        self._since: float | None = None
        self._up = False

    def __call__(self, cell: Cell, now: float) -> int:
        self._running.append((now, sum(model.admission.queue.running for model in cell.models)))
        while self._running[0][0] < now - self.LOOK_BACK_S:
            self._running.popleft()
        mean = sum(running for _, running in self._running) / len(self._running)
        desired = max(self._least, min(self._most, math.ceil(mean / self._target)))
        if desired == cell.wanted:
            self._since = None
            return desired
        up = desired > cell.wanted
        if self._since is None or up != self._up:
            self._since, self._up = now, up
        if now - self._since < (self.UP_S if up else self.DOWN_S):
            return cell.wanted
        self._since = None
        return desired


class ByLoad:
    """The product's policy (`deployments/scaling.py`), as its adapter calls it (`deployments/autoscaling.py`), with
    what the routers tell."""

    def __init__(
        self, config: ModelConfig, least: int, most: int, target: float | None = None, downscale_delay_s: float = 300.0
    ) -> None:
        target = config.target_ongoing_requests if target is None else target
        to_zero = max(downscale_delay_s, LEAST_TO_ZERO_S)
        self._rules = ScalingRules(least, most, target, config.max_ongoing, downscale_delay_s, to_zero)
        self._state, self._startup = ScalingState(), StartupTime()

    def __call__(self, cell: Cell, now: float) -> int:
        self._startup.note(len(cell.ready), cell.wanted, now)
        load = of_all(model.admission.load() for model in cell.models)
        decision = decide(load, cell.wanted, self._rules, self._startup.seconds, self._state, now)
        self._state = decision.state
        return decision.replicas
