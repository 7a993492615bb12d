"""What is said of a model's replicas."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.commands.status import deployment_state, ray_serve
from cluster.model_config import ModelConfig


def model(**values: object) -> ModelConfig:
    given = {"name": "m", "family": "llama", "checkpoint": "builtin:llama", **values}
    return ModelConfig.model_validate(given)


def starting(message: str) -> Any:
    return SimpleNamespace(replica_states={"STARTING": 1}, message=message)


@pytest.mark.parametrize("what", ["be scheduled", "initialize"])
def test_ray_s_warning_of_a_slow_start_is_not_repeated(what: str) -> None:
    message = f"Deployment 'm' in application 'nibble' has 1 replicas that have taken more than 30s to {what}."
    assert deployment_state(starting(message), model(), Counter(), []) == "1 starting"


def test_why_replicas_fail_to_start_is_told() -> None:
    assert deployment_state(starting("no such file"), model(), Counter(), []) == "1 starting; no such file"


def test_the_label_that_no_node_has_is_named() -> None:
    placed = model(nodes={"isa": ["amx"]})
    told = deployment_state(starting(""), placed, Counter({2: 1}), [{"nibble/isa": "avx2"}])
    assert told == "1 starting; no node has the label nibble/isa=amx; nibble/isa is avx2"
    # It is not the reason where a node has it, nor what to say of replicas that run.
    running = SimpleNamespace(replica_states={"RUNNING": 1}, message="")
    assert deployment_state(running, placed, Counter(), [{"nibble/isa": "avx2"}]) == "1 running"
    assert deployment_state(starting(""), placed, Counter(), [{"nibble/isa": "amx"}]) == "1 starting"


def test_a_model_at_zero_is_idle_and_not_broken() -> None:
    none = SimpleNamespace(replica_states={"RUNNING": 0}, message="")
    sleeping = model(replicas={"min": 0})
    assert deployment_state(none, sleeping, Counter(), []) == "idle; its next request starts a replica"
    assert deployment_state(none, model(), Counter(), []) == "no replica yet"
    failed = SimpleNamespace(replica_states={}, message="no such file")
    assert deployment_state(failed, sleeping, Counter(), []) == "no replica yet; no such file"


def test_only_what_concerns_the_user_is_said_by_serve_s_logger(caplog: pytest.LogCaptureFixture) -> None:
    ray_serve()
    ray_serve()
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        logger.error("LongPollClient 'AsyncioRouter' has been disabled: Bound asyncio event loop is not running")
        logger.info("Started")
        logger.error("a replica failed")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"a replica failed"}
