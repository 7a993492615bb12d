"""A model whose replica goes on when a test says so, and requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from cluster.model_config import ModelConfig
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.model_admission import Caller, ModelAdmission
from deployments.routing.sequences import sequences_of
from tests.unit.fakes import EchoModel

R = TypeVar("R")


class HeldModel(EchoModel):
    """One replica, which holds one request unless `queue` says otherwise; each goes on when `gate` is set."""

    def __init__(self, **queue: Any) -> None:
        super().__init__()
        given = {**self.config.model_dump(), "queue": {"max_ongoing": 1, **queue}}
        self.config = ModelConfig.model_validate(given)
        self.admission = ModelAdmission(self.config, lambda: 1)
        self.gate = asyncio.Event()
        self.begun: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.begun.append(request.request_id)
        await self.gate.wait()
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


def request(id: str, prompt: str = "a b", timeout_s: float | None = None) -> GenerationRequest:
    return GenerationRequest(request_id=id, prompt=prompt, max_tokens=2, timeout_s=timeout_s)


async def whole(model: EchoModel, *requests: GenerationRequest, caller: Caller = Caller()) -> list[str]:  # noqa: B008
    sequences = sequences_of(model, requests, caller)
    found = []
    try:
        while True:
            found.append((await sequences.__anext__()).chunk.text)
    except StopAsyncIteration:
        return found
    finally:
        await sequences.aclose()


def asked(coroutine: Awaitable[R]) -> asyncio.Future[R]:
    return asyncio.ensure_future(coroutine)


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(holds(), 30)


def idle(model: EchoModel) -> bool:
    queue = model.admission.queue
    queue.check_integrity()
    return (len(queue), queue.running) == (0, 0)
