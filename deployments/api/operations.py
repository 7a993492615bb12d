"""What the server does, once for all APIs: HTTP, gRPC and KServe parse into the bodies of `schema.py`, call an
operation, and write what it returns. Limits, deadlines, usage and the texts of the log are kept here.

The key and the size of a message are checked before it is parsed, where it arrives (`http_calls.py`, `grpc_calls.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from prometheus_client.core import Metric

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError
from deployments.api.calls import LONGEST_NAME, Call, Calls
from deployments.api.requests.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GeneratingBody,
    TokenizeRequest,
)
from deployments.observability.metrics import merged
from deployments.records import GenerationChunk
from deployments.routing.model_admission import Caller
from deployments.routing.router import ModelCard, Router, ServedModel, going_down
from deployments.routing.sequences import (
    SequenceChunk,
    Sequences,
    UsageCount,
    WholeSequence,
    best,
    joined,
    sequences_of,
)

GeneratingRequest = CompletionRequest | ChatRequest


class Encoded(NamedTuple):
    """Token ids, and how many of them the model's context holds."""

    ids: list[int]
    context: int


class Embedded(NamedTuple):
    """A vector of the model's width for each input, and the tokens of all inputs."""

    vectors: list[list[float]]
    prompt_tokens: int


async def no_metrics() -> list[Metric]:
    return []


class Operations:
    """Each operation notes in `call` what it is about and what it took. All raise RequestError. `cors_origins`: of web
    pages that may use them."""

    def __init__(self, router: Router, calls: Calls, cors_origins: tuple[str, ...] = ()) -> None:
        self.router = router
        self.calls = calls
        self.cors_origins = cors_origins
        self.metrics_elsewhere = no_metrics  # of the other routers, and of the replicas

    @property
    def limits(self) -> LimitsConfig:
        return self.router.limits

    async def drain(self, seconds: float) -> None:
        """From now on nothing is taken; what is in flight may go on for so many seconds, and then ends in an error."""
        self.router.draining = True
        await asyncio.sleep(seconds)
        self.router.end(going_down())

    def begin(self, call: Call, body: GeneratingRequest, id: str) -> Generation:
        """A completion that gives its chunks as they come. `id` names it in the replicas."""
        call.about(body.model, logged_prompt(body) if self.calls.prompts else None)
        session = session_of(call, body)
        requests = [replace(request, session=session) for request in body.completions(id, self.limits)]
        model, caller = self._model(call, body.model), Caller(call.key, body.batch)
        call.computes(model.config.name, len(requests))
        trace = call.trace("chat" if isinstance(body, ChatRequest) else "text_completion", body.model, requests)
        if trace is not None:
            requests = [replace(request, trace=trace) for request in requests]
        return Generation(call, sequences_of(model, requests, caller), len(requests), body)

    async def generate(self, call: Call, body: GeneratingRequest, id: str) -> list[WholeSequence]:
        """The whole completions: `n` a prompt, in order."""
        return await self.begin(call, body, id).whole()

    async def embed(self, call: Call, body: EmbeddingRequest) -> Embedded:
        call.about(body.model, body.input)
        inputs, limits = body.inputs(), self.limits
        if len(inputs) > limits.embeddings:
            raise InvalidRequestError(
                f"input: found {len(inputs)}, allowed are up to {limits.embeddings} (limits.embeddings)", "input"
            )
        model, until = self._model(call, body.model), Deadline(limits.timeout_s)
        call.computes(model.config.name, 0)
        call.trace("embeddings", body.model)
        work = sum(map(model.admission.estimate.of_prompt, inputs))
        vectors, prompt_tokens = [], 0
        async with model.admission.place(Caller(call.key), work, until.left()):
            for each in inputs:
                vector, tokens = await model.embed(each, limits.prompt_tokens, until.left())
                vectors.append(vector)
                prompt_tokens += tokens
                call.count(prompt_tokens, 0)
        return Embedded(vectors, prompt_tokens)

    async def tokenize(self, call: Call, body: TokenizeRequest) -> Encoded:
        call.about(body.model)
        model = self._model(call, body.model)
        ids = await model.tokenize(body.text(), body.add_special_tokens is not False, self.limits.timeout_s)
        return Encoded(ids, model.config.context)

    async def detokenize(self, call: Call, body: DetokenizeRequest) -> str:
        call.about(body.model)
        return await self._model(call, body.model).detokenize(body.tokens, self.limits.timeout_s)

    async def tokenizer_info(self, call: Call, model: str) -> dict[str, Any]:
        call.about(model)
        return await self._model(call, model).tokenizer_info(self.limits.timeout_s)

    def _model(self, call: Call, name: str) -> ServedModel:
        call.served = self.router.own_name(name)
        return self.router.model(name)

    def only_model(self) -> str | None:
        """The name of the model where one is served."""
        names = [card.root for card in self.router.cards() if card.id == card.root]
        return names[0] if len(names) == 1 else None

    def models(self) -> list[ModelCard]:
        return self.router.cards()

    def model(self, name: str) -> ModelCard:
        return self.router.card(name)

    def router_metrics(self) -> list[Metric]:
        """Of this router alone."""
        served = (card for card in self.router.cards() if card.id == card.root)
        return self.calls.metrics.families(served, self.router.refusals())

    async def metrics(self) -> list[Metric]:
        """Of all routers and replicas that answer in time."""
        return list(merged([*self.router_metrics(), *await self.metrics_elsewhere()]))

    def not_ready(self) -> list[str]:
        """The names of the models that do not take requests; the server is ready where there are none."""
        return self.router.not_ready()


class Deadline:
    """Seconds that are left of a request's time; None: no bound."""

    def __init__(self, timeout_s: float | None) -> None:
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    def left(self) -> float | None:
        return None if self._at is None else max(0.0, self._at - time.monotonic())


class Generation:
    """The chunks of one request, counted as they come: what a client that leaves has taken counts. It must be closed
    (`aclosing`), which stops the replicas."""

    def __init__(self, call: Call, sequences: Sequences, count: int, body: GeneratingBody) -> None:
        self._call = call
        self._sequences = sequences
        self._count = count
        self._body = body
        self._usage = UsageCount(body.sequences)
        self._unfinished = count
        self._first: asyncio.Task[SequenceChunk] | None = None

    @property
    def complete(self) -> bool:
        """Whether the chunk given last was the last one of all."""
        return not self._unfinished

    async def first_came(self, seconds: float) -> bool:
        """Whether the first chunk came within so many seconds. Raises what kept it from coming, so that an API can
        still choose its answer's status."""
        if self._first is None:
            self._first = asyncio.ensure_future(self._next())
        done, _ = await asyncio.wait({self._first}, timeout=seconds)
        for first in done:
            first.result()
        return bool(done)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> SequenceChunk:
        if self._first is not None:
            first, self._first = self._first, None
            return await first
        return await self._next()

    async def _next(self) -> SequenceChunk:
        item = await self._sequences.__anext__()
        self._unfinished -= item.chunk.finish_reason is not None
        self._usage.add(item.sequence, item.chunk)
        if item.chunk.token_ids:
            self._call.tokens_came(item.sequence)
        self._call.count(self._usage.prompt_tokens, self._usage.completion_tokens)
        if item.chunk.engine_times is not None:
            self._call.engine_took(item.chunk.engine_times)
        if item.chunk.finish_reason is not None:
            self._call.cached_tokens = self._usage.cached_tokens
            self._call.finish_reasons.append(item.chunk.finish_reason)
        self._call.note(completion=item.chunk.text)
        return item

    async def whole(self) -> list[WholeSequence]:
        parts: list[list[GenerationChunk]] = [[] for _ in range(self._count)]
        try:
            async for sequence, chunk in self:
                parts[sequence].append(chunk)
        finally:
            await self.aclose()
        return best([joined(part) for part in parts], self._body.n, self._body.sequences)

    async def aclose(self) -> None:
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._sequences.aclose()


def session_of(call: Call, body: GeneratingBody) -> str | None:
    """What a client calls the session of its requests, apart from those of other keys."""
    named = call.session or body.prompt_cache_key or body.user
    return None if not named else f"{call.key or ''}/{named[:LONGEST_NAME]}"


def logged_prompt(body: GeneratingRequest) -> str | Sequence[Any]:
    """As a log with prompts shows it."""
    if isinstance(body, CompletionRequest):
        return body.prompt
    return [message.model_dump(exclude_unset=True, exclude_defaults=True) for message in body.messages]
