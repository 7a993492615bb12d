"""What is said of a model's replicas."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.commands.status import deployment_state, ray_serve


def starting(message: str) -> Any:
    return SimpleNamespace(replica_states={"STARTING": 1}, message=message)


@pytest.mark.parametrize("what", ["be scheduled", "initialize"])
def test_ray_s_warning_of_a_slow_start_is_not_repeated(what: str) -> None:
    message = f"Deployment 'm' in application 'nibble' has 1 replicas that have taken more than 30s to {what}."
    assert deployment_state(starting(message), 2, Counter()) == "1 starting"


def test_why_replicas_fail_to_start_is_told() -> None:
    assert deployment_state(starting("no such file"), 2, Counter()) == "1 starting; no such file"


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
