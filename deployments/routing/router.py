"""The router's one path, under HTTP and gRPC alike: find the model, refuse what cannot run, stream what it says.

It knows nothing of Ray: a served model is reached through the small protocol `ServedModel`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol, TypeVar

from cluster.config import LimitsConfig, ModelConfig
from cluster.errors import ModelNotFoundError, UnavailableError
from deployments.records import Conversation, FinishReason, GenerationChunk, GenerationRequest, LoggedToken

T = TypeVar("T")


class ServedModel(Protocol):
    config: ModelConfig

    def ready(self) -> bool:
        """Whether at least one replica runs."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Raises RequestError, at the first chunk or later. Closing the generator stops the replica."""
        ...

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool) -> list[int]: ...

    async def detokenize(self, ids: Sequence[int]) -> str: ...

    async def embed(self, prompt: str | tuple[int, ...], max_tokens: int | None) -> tuple[list[float], int]:
        """The vector, and how many tokens the prompt has, `max_tokens` at most."""
        ...


class ModelCard(NamedTuple):
    """What clients are told of a model."""

    id: str
    family: str
    engine: str
    quantization: str
    context: int
    ready: bool


class ChoiceChunk(NamedTuple):
    """A piece of one of a request's sequences."""

    sequence: int
    chunk: GenerationChunk


class Completion(NamedTuple):
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[LoggedToken, ...]


class Router:
    def __init__(self, models: Mapping[str, ServedModel], limits: LimitsConfig | None = None) -> None:
        self._models = models
        self.limits = limits or LimitsConfig()

    def cards(self) -> list[ModelCard]:
        return [card(model) for model in self._models.values()]

    def card(self, name: str) -> ModelCard:
        """Raises ModelNotFoundError."""
        return card(self._known(name))

    def not_ready(self) -> list[str]:
        """The models without a running replica."""
        return [name for name, model in self._models.items() if not model.ready()]

    def model(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError, or UnavailableError while it has no replica."""
        model = self._known(name)
        if not model.ready():
            raise UnavailableError(f"model {name}: no replica is ready yet; try again later")
        return model

    def _known(self, name: str) -> ServedModel:
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"model: found {name!r}, served are {', '.join(sorted(self._models))}")
        return model

    async def generate(self, name: str, requests: Sequence[GenerationRequest]) -> AsyncGenerator[ChoiceChunk, None]:
        """The chunks of all sequences as they come, each sequence's in order; the last one of each carries
        finish_reason and its token counts.

        Raises what `model` raises, or a replica (InvalidRequestError for a prompt that is too long, QueueFullError,
        DeadlineError); the other sequences then end too.
        """
        model = self.model(name)
        if len(requests) == 1:
            async with aclosing(model.generate(requests[0])) as only:
                async for chunk in only:
                    yield ChoiceChunk(0, chunk)
            return
        # No more at once than the replicas hold: the rest of a wide request waits here, not in the model's queue,
        # which it would fill.
        slots = asyncio.Semaphore(model.config.max_ongoing * model.config.replicas.max)
        chunks: asyncio.Queue[ChoiceChunk | BaseException | None] = asyncio.Queue()

        async def run(index: int, request: GenerationRequest) -> None:
            try:
                async with slots, aclosing(model.generate(request)) as own:
                    async for chunk in own:
                        chunks.put_nowait(ChoiceChunk(index, chunk))
                chunks.put_nowait(None)
            except Exception as error:  # noqa: BLE001 - raised again by the one who takes it
                chunks.put_nowait(error)

        tasks = [asyncio.create_task(run(index, request)) for index, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                item = await chunks.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def card(model: ServedModel) -> ModelCard:
    config = model.config
    return ModelCard(config.name, config.family, config.engine, config.ggml_type, config.context, model.ready())


async def paced(items: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[T | None, None]:
    """The same items; None whenever the first one keeps its taker waiting for another `seconds`."""
    first = asyncio.ensure_future(anext(items))
    try:
        while not first.done():
            await asyncio.wait({first}, timeout=seconds)
            if not first.done():
                yield None
        yield first.result()
        async for item in items:
            yield item
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await items.aclose()


async def collect(chunks: AsyncGenerator[ChoiceChunk, None], sequences: int) -> list[Completion]:
    """The whole completions of an unstreamed request, in the order of its sequences."""
    parts: list[list[GenerationChunk]] = [[] for _ in range(sequences)]
    async for sequence, chunk in chunks:
        parts[sequence].append(chunk)
    return [joined(part) for part in parts]


def joined(chunks: Sequence[GenerationChunk]) -> Completion:
    last = chunks[-1]
    assert last.finish_reason is not None, "the last chunk carries finish_reason"
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(token for chunk in chunks for token in chunk.logprobs),
    )


def best(completions: Sequence[Completion], n: int, sequences: int) -> list[Completion]:
    """Of each prompt's `sequences` completions the `n` with the highest mean log probability a token, best first."""
    if sequences == n:
        return list(completions)
    chosen = []
    for start in range(0, len(completions), sequences):
        chosen += sorted(completions[start : start + sequences], key=mean_logprob, reverse=True)[:n]
    return chosen


def mean_logprob(completion: Completion) -> float:
    logprobs = [token.logprob for token in completion.logprobs if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


class UsageCount:
    """Prompt tokens, each prompt's once however many sequences continue it, and completion tokens of all, so far."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._prompts: dict[int, int] = {}
        self._completions: dict[int, int] = {}

    def add(self, sequence: int, chunk: GenerationChunk) -> None:
        self._prompts[sequence // self._sequences] = chunk.prompt_tokens
        self._completions[sequence] = chunk.completion_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self._completions.values())
