"""Titles of Ray's worker processes, as they were seen."""

from __future__ import annotations

import pytest

from tests.ray_titles import replica_of


@pytest.mark.parametrize(
    ("title", "deployment"),
    [
        ("ray::ServeReplica:m.72ad57a2:m", "m"),
        ("ray::72ad57a2:m.reconfigure", "m"),
        ("ray::ServeReplica:nibble:router", "router"),
        ("ray::ServeReplica:nibble:router.check_health", "router"),
        ("ray::ServeReplica:m.72ad57a2:m\0\0", "m"),
        ("ray::IDLE", None),
        ("ray::shard_task", None),
        ("ray::ServeController.listen_for_change", None),
        ("ray::ProxyActor", None),
        ("python -m cluster.cli serve ray::ServeReplica:m:m", None),
        ("", None),
    ],
)
def test_the_deployment_of_a_replica_is_known_whatever_the_replica_does(title: str, deployment: str | None) -> None:
    assert replica_of(title) == deployment
