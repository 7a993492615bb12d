"""What a start's log line says."""

from __future__ import annotations

import time

import pytest

from deployments.engines.openvino.stages import Stages


def test_stages_come_in_order_and_the_same_one_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.5, 2.0, 2.25, 3.0, 4.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stages = Stages()
    for name in ("weights", "compile", "weights"):
        with stages.stage(name):
            pass
    assert str(stages) == "weights 2.5 s, compile 0.2 s"


def test_a_stage_that_fails_counts_and_its_error_goes_on() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="damaged"), stages.stage("weights"):
        raise ValueError("damaged")
    assert list(stages.seconds) == ["weights"]
