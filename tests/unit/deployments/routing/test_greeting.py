"""A first answer gives way to every other request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cluster.errors import UnavailableError
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.greeting import FirstAnswer, Traffic, first_answer


class Model:
    """A served model that says one word, and the next one when `go_on` is set."""

    def __init__(self, traffic: Traffic, fails: bool = False) -> None:
        self.traffic = traffic
        self.fails = fails
        self.said_one, self.go_on = asyncio.Event(), asyncio.Event()
        self.requests: list[GenerationRequest] = []
        self.closed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.requests.append(request)
        try:
            with self.traffic.request():
                if self.fails:
                    raise UnavailableError("its replica died")
                yield GenerationChunk(" one", (1,), None, prompt_tokens=1, completion_tokens=1)
                self.said_one.set()
                await self.go_on.wait()
                yield GenerationChunk(" two", (2,), "length", prompt_tokens=1, completion_tokens=2)
        finally:
            self.closed += 1


async def ask(model: Any) -> FirstAnswer:
    return await first_answer(model, model.traffic, "Q:", 12)


async def test_while_nobody_else_is_served_it_is_whole() -> None:
    model = Model(Traffic())
    model.go_on.set()
    answer = await ask(model)
    assert (answer.text, answer.skipped, model.traffic.requests) == (" one two", False, 0)
    assert answer.first_token_s is not None
    (request,) = model.requests
    assert (request.prompt, request.max_tokens, request.sampling.temperature) == ("Q:", 12, 0)


async def test_while_others_are_served_no_model_is_asked() -> None:
    model = Model(Traffic())
    with model.traffic.request():
        assert await ask(model) == FirstAnswer(skipped=True)
    assert model.requests == []


async def test_a_request_that_comes_meanwhile_ends_it() -> None:
    model = Model(Traffic())
    greeting = asyncio.create_task(ask(model))
    await model.said_one.wait()
    with model.traffic.request():
        answer = await asyncio.wait_for(greeting, 30)
        assert (model.closed, model.traffic.requests) == (1, 1), "the replica is told to stop"
    assert (answer.text, answer.skipped) == (" one", True)


async def test_what_a_model_raises_is_raised() -> None:
    model = Model(Traffic(), fails=True)
    with pytest.raises(UnavailableError, match="its replica died"):
        await ask(model)
    assert model.traffic.requests == 0
