"""The adapter of `deployments/scaling.py` to Ray Serve's autoscaling: a policy, which Serve's controller calls twice a
second for each model that scales.

How the load comes here: most requests of a busy model wait in the routers' admission, where Serve does not count them,
and a replica's own numbers (`record_autoscaling_stats`) are 10 s old and are none at zero replicas. The routers tell an
actor what they have anyway, twice a second and at once when a request finds no replica; a task in the controller asks
that actor, so that the policy, which must not block, reads what was heard last (`deployments/load_board.py`).

What Serve does to a policy's number is switched off by `delays`: the policy has its own. One thing stays: while a
deployment has no running replica and Serve itself counts a request, Serve starts one replica and does not ask the
policy. The router's admission therefore holds back what it can (`ModelAdmission.capacity`), and this stays as the way
to wake a model when the actor is not heard.

Serve pickles this module by value, so that what is to be one of a process is in others.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.model_config import ModelConfig
from deployments import load_board, scaling

# Seconds. Serve counts a request so long after its end, and its handle's next report comes up to 10 s later. No shorter
# than `ReplicasConfig.to_zero_delay_s` allows: else a model that went to zero would wake again by itself (ray#33416).
LOOK_BACK_S = 15.0


class LoadPolicy:
    """Serve makes one of each deployment that scales, anew where the deployment's settings change."""

    def __init__(self, **rules: Any) -> None:
        """`model`: its name; the rest as in `ScalingRules`."""
        self._model = rules.pop("model")
        self._rules = scaling.ScalingRules(min=0, max=0, **rules)
        self._state = scaling.ScalingState()
        self._startup = scaling.StartupTime()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        board = load_board.load_board()
        board.listen()
        now, running, wanted = context.current_time or 0.0, context.current_num_replicas, context.target_num_replicas
        self._startup.note(running, wanted, now)
        load = None if board.loads is None else board.loads.get(self._model)
        if load is None:
            return wanted, {}
        rules = self._rules._replace(
            min=context.capacity_adjusted_min_replicas, max=context.capacity_adjusted_max_replicas
        )
        decision = scaling.decide(load, wanted, rules, self._startup.seconds, self._state, now)
        self._state = decision.state
        return decision.replicas, {}


def autoscaling_config(model: ModelConfig) -> dict[str, Any]:
    """Serve's settings of a model that scales."""
    replicas = model.replicas
    kwargs = {
        "model": model.name,
        "target_ongoing": model.target_ongoing_requests,
        "max_ongoing": model.max_ongoing,
        "downscale_delay_s": replicas.downscale_delay_s,
        "downscale_to_zero_delay_s": replicas.to_zero_delay_s,
    }
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": model.target_ongoing_requests,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {"policy_function": f"{__name__}:{LoadPolicy.__name__}", "policy_kwargs": kwargs},
    }
