"""When the router looks at Serve's status, and what a replica's death does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RayActorError

from cluster.config import ModelConfig
from cluster.errors import UnavailableError
from deployments.routing import serve_model
from deployments.routing.greeting import Traffic
from deployments.routing.serve_model import ServeModel, watch_readiness

CONFIG = ModelConfig(name="m", family="llama", checkpoint="builtin:llama")


class DeadReplica:
    """A deployment's handle whose only replica has died."""

    def options(self, **_: Any) -> DeadReplica:
        return self

    def remote(self, *_: Any) -> DeadReplica:
        return self

    def __await__(self) -> Any:
        raise RayActorError


class Status:
    """Stands for `serve.status`: says how many replicas run, and counts how often it was asked."""

    def __init__(self) -> None:
        self.running = 0
        self.asked = 0

    def __call__(self) -> Any:
        self.asked += 1
        deployment = SimpleNamespace(replica_states={"RUNNING": self.running})
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"m": deployment})})


@asynccontextmanager
async def watched() -> AsyncIterator[ServeModel]:
    lost = asyncio.Event()
    model = ServeModel(CONFIG, DeadReplica(), lost, Traffic())  # type: ignore[arg-type]
    watch = asyncio.create_task(watch_readiness("app", [model], lost))
    try:
        yield model
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(holds(), 30)


async def test_a_request_that_finds_its_replica_dead_makes_the_router_look_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = Status()
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve_model, "UNSETTLED_POLL_S", 0.001)
    monkeypatch.setattr(serve_model, "SETTLED_POLL_S", 1000.0)
    async with watched() as model:
        await until(lambda: status.asked > 3)
        assert not model.ready(), "it is asked again and again while no replica runs"
        status.running = 1
        await until(model.ready)
        asked = status.asked
        status.running = 0
        await asyncio.sleep(0.1)
        assert (status.asked, model.ready()) == (asked, True), "all was well: the next look is far away"

        with pytest.raises(UnavailableError, match="its replica died"):
            await model.tokenize("text", True)
        await until(lambda: not model.ready())
        status.running = 1
        await until(model.ready)
        asked = status.asked
        await until(lambda: status.asked > asked + 3)  # for a while after a death


async def test_a_look_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    status, failed = Status(), 0
    status.running = 1

    def fails() -> None:
        nonlocal failed
        failed += 1
        raise RuntimeError("the controller restarts")

    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve_model, "SETTLED_POLL_S", 0.001)
    async with watched() as model:
        await until(model.ready)
        monkeypatch.setattr(serve, "status", fails)
        await until(lambda: failed > 3)
        assert model.ready()
        status.running = 0
        monkeypatch.setattr(serve, "status", status)
        await until(lambda: not model.ready())
