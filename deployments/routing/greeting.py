"""A model's first answer, which `nibble serve` shows: only while nobody else is served."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from deployments.records import GenerationRequest, SamplingParams
from deployments.routing.router import ServedModel


class Traffic:
    """The completions and embeddings in flight at this router, of all models: they share the nodes' cores."""

    def __init__(self) -> None:
        self.requests = 0
        self.several = asyncio.Event()  # set while there is more than one

    @contextmanager
    def request(self) -> Iterator[None]:
        self.requests += 1
        self._note()
        try:
            yield
        finally:
            self.requests -= 1
            self._note()

    def _note(self) -> None:
        if self.requests > 1:
            self.several.set()
        else:
            self.several.clear()


@dataclass
class FirstAnswer:
    """`first_token_s` is None where no token came; `skipped`: others were being served, so that the model was not asked
    or its answer was cut short."""

    text: str = ""
    first_token_s: float | None = None
    skipped: bool = False


async def first_answer(model: ServedModel, traffic: Traffic, prompt: str, max_tokens: int) -> FirstAnswer:
    """Greedy. The model counts its requests in `traffic`; the first one that comes meanwhile ends this one, which stops
    the engine before its next token. Raises RequestError as `model.generate` does."""
    answer = FirstAnswer()
    if traffic.requests:
        answer.skipped = True
        return answer
    reading = asyncio.ensure_future(read(model, prompt, max_tokens, answer))
    other = asyncio.ensure_future(traffic.several.wait())
    try:
        await asyncio.wait({reading, other}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            reading.result()
        else:
            answer.skipped = True
    finally:
        for task in (reading, other):
            task.cancel()
        await asyncio.gather(reading, other, return_exceptions=True)
    return answer


async def read(model: ServedModel, prompt: str, max_tokens: int, answer: FirstAnswer) -> None:
    request = GenerationRequest(
        request_id=f"greeting-{uuid.uuid4().hex}",
        prompt=prompt,
        max_tokens=max_tokens,
        stop=(),
        sampling=SamplingParams(temperature=0),
    )
    started = time.monotonic()
    async with aclosing(model.generate(request)) as chunks:
        async for chunk in chunks:
            if answer.first_token_s is None and chunk.completion_tokens:
                answer.first_token_s = time.monotonic() - started
            answer.text += chunk.text
