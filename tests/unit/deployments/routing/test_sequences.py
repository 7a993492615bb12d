"""How one request's sequences share a model's slots, and what ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from cluster.errors import UnavailableError
from cluster.model_config import ModelConfig
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.model_admission import Caller
from deployments.routing.sequences import SequenceChunk, Sequences, sequences_of
from tests.unit.fakes import EchoModel

CALLER = Caller()


class CountedModel(EchoModel):
    """Counts how many of its completions run at once; each goes on when `gate` is set."""

    def __init__(self, max_ongoing: int, replicas: int) -> None:
        super().__init__()
        queue, scale = {"max_ongoing": max_ongoing}, {"min": 1, "max": replicas}
        self.config = ModelConfig.model_validate({**self.config.model_dump(), "queue": queue, "replicas": scale})
        self.admission.change(self.config)
        self.running = self.most = 0
        self.gate = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            async with aclosing(super().generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.running -= 1


def requests(count: int, prompt: str = "a b") -> list[GenerationRequest]:
    return [GenerationRequest(request_id=str(index), prompt=prompt, max_tokens=2) for index in range(count)]


async def drain(sequences: Sequences, found: list[SequenceChunk]) -> None:
    while True:
        try:
            found.append(await sequences.__anext__())
        except StopAsyncIteration:
            return


async def test_a_wide_request_runs_no_more_at_once_than_the_replicas_hold() -> None:
    model = CountedModel(max_ongoing=3, replicas=2)
    sequences = sequences_of(model, requests(20), CALLER)
    while model.running < 6:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert model.most == 6
    model.gate.set()
    found: list[SequenceChunk] = []
    await drain(sequences, found)
    assert model.most == 6
    assert sorted(item.sequence for item in found if item.chunk.finish_reason) == list(range(20))
    for sequence in range(20):
        assert "".join(item.chunk.text for item in found if item.sequence == sequence) == "a b "


async def test_an_error_of_one_ends_all_once_they_are_closed() -> None:
    model = CountedModel(max_ongoing=8, replicas=1)
    model.error, model.error_at = UnavailableError("gone"), 1
    sequences = sequences_of(model, requests(3), CALLER)
    model.gate.set()
    with pytest.raises(UnavailableError):
        await drain(sequences, [])
    await sequences.aclose()
    assert (model.running, model.closed) == (0, 3)


async def test_closing_stops_what_still_runs() -> None:
    for count in (1, 5):
        model = CountedModel(max_ongoing=8, replicas=1)
        model.gate.set()
        sequences = sequences_of(model, requests(count, "a b c d e f g h"), CALLER)
        await sequences.__anext__()
        await sequences.aclose()
        assert (model.running, model.closed) == (0, count)
