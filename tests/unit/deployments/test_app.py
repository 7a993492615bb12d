from __future__ import annotations

from cluster.config import ModelConfig
from deployments.app import scaling


def model(**values: object) -> ModelConfig:
    given = {"name": "a", "family": "llama", "checkpoint": "builtin:llama", **values}
    return ModelConfig.model_validate(given)


def test_a_fixed_number_of_replicas_is_not_left_to_the_autoscaler() -> None:
    assert scaling(model(replicas={"min": 3, "max": 3})) == {"num_replicas": 3}
    assert scaling(model()) == {"num_replicas": 1}


def test_a_range_of_replicas_scales_on_the_requests_of_each() -> None:
    scaled = scaling(model(replicas={"min": 1, "max": 4}, queue={"max_ongoing": 6}))
    assert scaled == {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3}}
    scaled = scaling(model(replicas={"min": 1, "max": 2, "target_ongoing_requests": 1.5}))
    assert scaled["autoscaling_config"]["target_ongoing_requests"] == 1.5
