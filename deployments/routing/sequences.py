"""The sequences that one request asks for (prompts times n or best_of), from one served model, and what they become.

A chunk crosses as little Python as possible on its way back: a coroutine here, not a generator.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple, Protocol

from cluster.errors import DeadlineError
from deployments.observability.tracing import traced
from deployments.records import FinishReason, GenerationChunk, GenerationRequest, LoggedToken, MessagePiece, ToolCall
from deployments.routing.admission import QueuePlace
from deployments.routing.model_admission import Caller
from deployments.routing.router import ServedModel


class SequenceChunk(NamedTuple):
    """A piece of one of a request's sequences."""

    sequence: int
    chunk: GenerationChunk


class Sequences(Protocol):
    """The chunks of all sequences as they come, each sequence's in order; the last one of each carries finish_reason
    and its token counts. A replica's error ends all."""

    async def __anext__(self) -> SequenceChunk:
        """Raises StopAsyncIteration behind the last chunk, and what the model raises (InvalidRequestError for a prompt
        that is too long, QueueFullError, DeadlineError)."""
        ...

    async def aclose(self) -> None:
        """Stops the replicas, if anything still runs."""
        ...


def sequences_of(model: ServedModel, requests: Sequence[GenerationRequest], caller: Caller) -> Sequences:
    if len(requests) == 1:
        return OneSequence(model, requests[0], caller)
    return ManySequences(model, requests, caller)


class OneSequence:
    """It has its place in the model's admission from `begin`, or the first chunk, to the last one."""

    def __init__(self, model: ServedModel, request: GenerationRequest, caller: Caller) -> None:
        self._model, self._request, self._caller = model, request, caller
        self._place: QueuePlace | None = None
        self._chunks: AsyncGenerator[GenerationChunk, None] | None = None
        self._last: GenerationChunk | None = None

    async def begin(self, kept: bool = False) -> None:
        """Raises QueueFullError (unless the place is `kept`) and DeadlineError."""
        admission, request = self._model.admission, self._request
        work = admission.estimate.of(request)
        with traced(request, "admission"):
            self._place = await admission.admit(self._caller, work, request.timeout_s, kept)
        if request.timeout_s is not None and self._place.waited_s:
            request = replace(request, timeout_s=max(0.0, request.timeout_s - self._place.waited_s))
        self._chunks = self._model.generate(request)

    async def __anext__(self) -> SequenceChunk:
        if self._chunks is None:
            await self.begin()
            assert self._chunks is not None, "it has begun"
        try:
            self._last = chunk = await self._chunks.__anext__()
        except Exception as error:
            waited = 0.0 if self._place is None else self._place.waited_s
            self._leave(failed=not isinstance(error, StopAsyncIteration))
            if isinstance(error, DeadlineError) and waited:  # whose message knows the time that was left then
                allowed = f"the {self._request.timeout_s:g} s it was allowed, of which it waited {waited:.1f} s"
                raise DeadlineError(f"the request took longer than {allowed}") from None
            raise
        if chunk.finish_reason is not None:
            self._leave()
        return SequenceChunk(0, chunk)

    async def aclose(self) -> None:
        if self._chunks is not None:
            await self._chunks.aclose()
        self._leave()

    def _leave(self, failed: bool = False) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._model.admission.leave(place, self._request, self._last, failed)


class ManySequences:
    """The sequences of a wide request enter the model's queue one after the other, which they would fill together; once
    the first one has entered, none is refused."""

    def __init__(self, model: ServedModel, requests: Sequence[GenerationRequest], caller: Caller) -> None:
        self._model, self._caller = model, caller
        self._turn = asyncio.Lock()
        self._failed = False
        self._items: asyncio.Queue[SequenceChunk | BaseException | None] = asyncio.Queue()
        self._left = len(requests)
        self._tasks = [asyncio.ensure_future(self._run(index, request)) for index, request in enumerate(requests)]

    async def _run(self, index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(OneSequence(self._model, request, self._caller)) as sequence:
                async with self._turn:
                    if self._failed:
                        return
                    await sequence.begin(kept=index > 0)
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        self._items.put_nowait(SequenceChunk(index, (await sequence.__anext__()).chunk))
            self._items.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised again by the one who takes it
            self._failed = True
            self._items.put_nowait(error)

    async def __anext__(self) -> SequenceChunk:
        while self._left:
            item = await self._items.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                return item
            self._left -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class WholeMessage(NamedTuple):
    content: str
    tool_calls: tuple[ToolCall, ...]


class WholeSequence(NamedTuple):
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[LoggedToken, ...]
    prompt_token_ids: tuple[int, ...] = ()
    message: WholeMessage | None = None  # of a request that may call tools


def joined(chunks: Sequence[GenerationChunk]) -> WholeSequence:
    last = chunks[-1]
    assert last.finish_reason is not None, "the last chunk carries finish_reason"
    return WholeSequence(
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(token for chunk in chunks for token in chunk.logprobs),
        prompt_token_ids=chunks[0].prompt_token_ids,
        message=whole_message([chunk.message for chunk in chunks if chunk.message is not None]),
    )


def whole_message(pieces: Sequence[MessagePiece]) -> WholeMessage | None:
    if not pieces:
        return None
    calls: list[ToolCall] = []
    for piece in (piece for message in pieces for piece in message.tool_calls):
        if piece.id is not None and piece.name is not None:
            calls.append(ToolCall(piece.id, piece.name, piece.arguments))
        else:
            calls[piece.index] = replace(calls[piece.index], arguments=calls[piece.index].arguments + piece.arguments)
    return WholeMessage("".join(message.content for message in pieces), tuple(calls))


def best(completions: Sequence[WholeSequence], n: int, sequences: int) -> list[WholeSequence]:
    """Of each prompt's `sequences` completions the `n` with the highest mean log probability a token, best first."""
    if sequences == n:
        return list(completions)
    chosen = []
    for start in range(0, len(completions), sequences):
        chosen += sorted(completions[start : start + sequences], key=mean_logprob, reverse=True)[:n]
    return chosen


def mean_logprob(completion: WholeSequence) -> float:
    logprobs = [token.logprob for token in completion.logprobs if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


class UsageCount:
    """Prompt tokens, each prompt's once however many sequences continue it, and completion tokens of all, so far. Of a
    prompt as many are cached as all of its sequences found so: the first one may compute it for the others."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._prompts: dict[int, int] = {}
        self._completions: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def add(self, sequence: int, chunk: GenerationChunk) -> None:
        self._prompts[sequence // self._sequences] = chunk.prompt_tokens
        self._completions[sequence] = chunk.completion_tokens
        if chunk.completion_tokens:
            self._cached[sequence] = chunk.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        fewest: dict[int, int] = {}
        for sequence, cached in self._cached.items():
            prompt = sequence // self._sequences
            fewest[prompt] = min(cached, fewest.get(prompt, cached))
        return sum(fewest.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self._completions.values())
