from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.machine.topology import Cpu
from cluster.model_config import ModelConfig
from deployments import replica
from deployments.replica import own_cores

MODEL = ModelConfig(name="m", family="llama", checkpoint="builtin:llama", threads=2)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the log says, on a node with one core of two hardware threads on each of two NUMA nodes."""
    cpus = [Cpu(0, 0, 0), Cpu(1, 0, 0), Cpu(2, 2, 1), Cpu(3, 2, 1)]
    monkeypatch.setattr(replica, "topology", lambda _: cpus)
    monkeypatch.setattr(replica, "available_cores", lambda: 4)
    # Serve's logger hands nothing on to the root's handlers once Serve has set it up.
    monkeypatch.setattr(replica.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, replica.logger.name):
        yield caplog


def test_a_replica_tells_what_its_cores_are_short_of(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    claim = own_cores(tmp_path, MODEL)
    assert claim is not None
    assert claim.cores == (0, 2)
    assert said.messages == ["m: threads: 2 on CPUs (0, 2): they are of NUMA nodes 0, 1"]


def test_cores_that_are_short_of_nothing_are_no_news(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    claim = own_cores(tmp_path, MODEL.model_copy(update={"threads": 1}))
    assert claim is not None
    assert said.messages == []


def test_threads_under_a_cpu_quota_are_bound_to_no_cores(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "available_cores", lambda: 1)
    assert own_cores(tmp_path, MODEL.model_copy(update={"threads": 1})) is None
    assert said.messages == ["m: its threads have no cores of their own, because of the container's CPU quota"]
    assert not list(tmp_path.iterdir())
