"""Models with `min: 0`: what finds no replica, and when a model is idle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import DeadlineError
from cluster.model_config import ModelConfig
from deployments.routing import model_admission
from deployments.routing.model_admission import ModelAdmission
from tests.unit.deployments.routing.held_model import HeldModel, asked, idle, request, until, whole
from tests.unit.fakes import EchoModel


class SleepingModel(HeldModel):
    """Without a replica, until `replicas` says otherwise; a request starts one."""

    def __init__(self, **queue: Any) -> None:
        super().__init__(**queue)
        self.config = ModelConfig.model_validate({**self.config.model_dump(), "replicas": {"min": 0, "max": 4}})
        self.replicas: int | None = 0
        self.woken = 0
        self.admission = ModelAdmission(self.config, lambda: self.replicas)
        self.admission.wake = self.wake
        self.gate.set()

    def wake(self) -> None:
        self.woken += 1


async def test_what_finds_no_replica_waits_where_the_policy_sees_it_until_there_are_some() -> None:
    model = SleepingModel()
    asking = [asked(whole(model, request(id, timeout_s=60))) for id in "abc"]
    await until(lambda: len(model.admission.queue) == 3)
    load = model.admission.load()
    assert (load.running, load.queued, load.idle_s, model.woken) == (0, 3, 0.0, 1)
    assert load.queued_tokens > 0
    assert model.admission.queue.rate() is None, "nothing is refused by a rate at zero"
    model.replicas = 2
    assert await asyncio.gather(*asking) == [["a ", "b "]] * 3
    assert idle(model)
    assert model.admission.capacity() == 2


async def test_a_model_that_slept_refuses_nobody_by_the_rate_that_it_had() -> None:
    model = SleepingModel()
    model.replicas = 1
    await whole(model, request("a"))
    assert model.admission.queue.rate() is not None
    model.replicas = 0
    asking = asked(whole(model, request("b", timeout_s=60)))
    await until(lambda: len(model.admission.queue) == 1)
    other = asked(whole(model, request("c", timeout_s=1e-6)))
    with pytest.raises(DeadlineError, match="waited longer"):
        await other
    model.replicas = 1
    assert await asking == ["a ", "b "]


async def test_serve_s_queue_sees_the_request_where_the_policy_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_admission, "HOLD_S", 0.0)
    model = SleepingModel()
    assert await whole(model, request("a")) == ["a ", "b "]


async def test_a_model_that_never_sleeps_lets_serve_s_queue_see_its_first_requests() -> None:
    model = HeldModel()
    model.admission = ModelAdmission(model.config, lambda: 0)
    model.gate.set()
    assert await whole(model, request("a")) == ["a ", "b "]


async def test_a_model_is_idle_from_the_end_of_the_last_request_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    admission = ModelAdmission(EchoModel().config, lambda: 1)
    now += 3
    assert admission.load().idle_s == 3, "from the router's start"
    with admission.use():
        now += 5
        assert admission.load().idle_s == 0
    now += 2
    assert admission.load().idle_s == 2
    place = admission.queue.enter(None, 5)
    assert (admission.load().idle_s, admission.load().running) == (0, 1)
    now += 2
    admission.queue.leave(place)
    assert admission.load().tokens_per_s == 2.5
