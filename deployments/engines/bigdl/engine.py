"""The bigdl engine: bigdl-llm's native ggml runtime behind the Engine contract, one sequence at a time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.errors import EngineError
from cluster.machine.isa import Isa, choose_isa
from deployments.cores import check_cores
from deployments.engines.base import Token, TokenRequest
from deployments.engines.bigdl.model import CachedModel, PrefillCancelledError, load_model
from deployments.engines.bigdl.timings import Timings
from deployments.engines.handover import Handover, closed_error
from deployments.engines.health import EngineHealth
from deployments.engines.requests import check_request
from deployments.engines.sampling import Sampler, log_probabilities
from deployments.records import FinishReason

T = TypeVar("T")


@dataclass
class EngineCounters:
    """Written by the worker thread alone."""

    requests: int = 0  # that reached the library
    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens taken from the KV cache
    scored_tokens: int = 0  # of prompts whose log probabilities were asked for; not in prompt_tokens
    generated_tokens: int = 0
    cancelled: int = 0  # of `requests`


class BigdlEngine:
    """Every native call runs in one worker thread, so requests take turns in the order in which they came, the event
    loop never waits for the library, and the library's own threads inherit the worker's cores."""

    name = "bigdl"

    def __init__(
        self,
        folder: Path,
        threads: int,
        context: int,
        cores: Sequence[int] | None = None,
        isa: Isa | None = None,
    ) -> None:
        """Loads the artifact in `folder` with `threads` threads on `cores` (by default all that the process may use).

        Raises EngineError for more threads than this process may use cores, for cores that it may not use, and for what
        the library cannot load; ArtifactError for a damaged artifact.
        """
        self.threads = threads
        self.context = context
        self.isa = choose_isa(isa)
        self.cores = check_cores(threads, cores)
        self._counters = EngineCounters()
        self._closed = False
        self._health = EngineHealth()
        self._jobs = 0  # whose tasks wait for them
        started = time.perf_counter()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bigdl")
        try:
            self._model = self._worker.submit(self._load, folder).result()
        except BaseException:
            self._worker.shutdown()
            raise
        self.timings = Timings(load_s=time.perf_counter() - started)  # of the last request that ended whole
        self.vocab_size = self._model.vocab_size

    async def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
        """See Engine.generate. Raises InvalidRequestError for a prompt or max_tokens that cannot be served."""
        check_request(request, self.context, self.vocab_size)
        with self._job(partial(self._generate, request, time.monotonic())) as handover:
            while True:
                tokens = await handover.take()
                yield tokens
                if tokens[-1].finish_reason is not None:
                    return

    async def score(self, prompt: Sequence[int], logprobs: int) -> list[Token]:
        """See Engine.score. Raises InvalidRequestError for a prompt that cannot be served."""
        self._model.check_prompt(prompt)
        with self._job(partial(self._score, prompt, logprobs)) as handover:
            scored: list[Token] = (await handover.take())[0]
            return scored

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """See Engine.embed: what the output layer makes the logits of, after the model's final norm; every family has
        it. Raises InvalidRequestError for a prompt that cannot be served."""
        self._model.check_prompt(prompt)
        with self._job(partial(self._embed, prompt)) as handover:
            vector: list[float] = (await handover.take())[0]
            return vector

    def info(self) -> dict[str, str | int | float]:
        return {
            "engine": self.name,
            "isa": self.isa,
            "threads": self.threads,
            "cores": ",".join(str(core) for core in self.cores),
            "context": self.context,
            "running": min(1, self._jobs),
            "waiting": max(0, self._jobs - 1),
            "mapped_bytes": self._model.mapped_bytes,  # of weights, which the node's replicas share
            **asdict(self._counters),
        }

    def check_health(self, stall_s: float | None) -> None:
        self._health.check(stall_s)

    def tokenize(self, text: bytes) -> list[int]:
        """Ids by the library's own tokenizer. Waits for its turn; do not call it on the event loop."""
        return self._submit(lambda: self._model.tokenize(text)).result()

    def detokenize(self, ids: Sequence[int]) -> bytes:
        """Bytes by the library's own vocabulary. Waits for its turn; do not call it on the event loop."""
        return self._submit(lambda: self._model.detokenize(ids)).result()

    def check_integrity(self) -> None:
        """Raises EngineError where the engine's books do not add up. Waits for its turn."""
        self._submit(self._check_books).result()

    def close(self) -> None:
        """Ends the running request before its next token, drops those that wait and frees the library's memory."""
        if self._closed:
            return
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._model.close()

    @contextmanager
    def _job(self, work: Callable[[Handover[T]], None]) -> Iterator[Handover[T]]:
        """Runs `work` when its turn comes; what it puts into the handover is taken within the context."""
        handover: Handover[T] = Handover(asyncio.get_running_loop())
        job = self._submit(lambda: self._run(work, handover))
        # A job that `close` drops from the queue must not leave its task waiting.
        job.add_done_callback(lambda job: handover.fail(closed_error()) if job.cancelled() else None)
        self._jobs += 1
        try:
            yield handover
        finally:
            # A job that still waits for its turn never starts, one that runs ends before its next token.
            handover.cancel()
            job.cancel()
            self._jobs -= 1

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        if self._closed:
            raise closed_error()
        try:
            return self._worker.submit(job)
        except RuntimeError:  # it was closed since
            raise closed_error() from None

    def _load(self, folder: Path) -> CachedModel:
        # Before the library is loaded: the threads that it starts later inherit the mask of this one.
        os.sched_setaffinity(0, self.cores)
        model = load_model(folder, self.threads, self.context, self.isa)
        try:
            model.prefill([0])  # a damaged model fails here, not at the first request
        except BaseException:
            model.close()
            raise
        return model

    def _run(self, work: Callable[[Handover[T]], None], handover: Handover[T]) -> None:
        self._counters.requests += 1
        self._health.working()
        try:
            work(handover)
            self._health.succeeded()
        except PrefillCancelledError:
            self._counters.cancelled += 1
            handover.fail(closed_error())
        except BaseException as error:  # noqa: BLE001 - it is raised again in the task that waits for the tokens
            self._health.failed(error)
            self._model.forget()
            handover.fail(error)
        finally:
            self._health.idle()

    def _generate(self, request: TokenRequest, came: float, handover: Handover[Token]) -> None:
        begun = time.monotonic()
        counters, model, cancelled = self._counters, self._model, self._cancelled(handover)
        timings, started = Timings(load_s=self.timings.load_s), time.perf_counter()
        eos_ids, mask = request.eos_token_ids, request.mask
        sampler = Sampler(request.sampling, request.prompt, eos_ids, mask, request.generated)
        with timings.prompt.measure(0):
            logits, reused = model.prefill(request.prompt, cancelled)
        timings.prompt.tokens = len(request.prompt) - reused
        counters.prompt_tokens += len(request.prompt)
        counters.reused_tokens += reused
        for token in request.generated:
            # One by one, as they were decoded before: a block of them would give other float noise.
            if cancelled():
                raise PrefillCancelledError
            logits = model.decode(token)
        limit = min(request.max_tokens, self.context - len(request.prompt))
        for count in range(len(request.generated) + 1, limit + 1):
            if cancelled():
                raise PrefillCancelledError
            with timings.sample.measure():
                token = sampler.next(logits)
            counters.generated_tokens += 1
            reason: FinishReason | None = "length" if count == limit else None
            if token in request.eos_token_ids:
                reason = "stop"
            if reason is not None:  # before the last token is handed over
                timings.total_s = time.perf_counter() - started
                self.timings = timings
            first = count == len(request.generated) + 1
            how = (reused, begun - came, time.monotonic() - begun) if first else ()
            if request.logprobs is None:
                handover.put(Token(token, reason, None, (), *how))
            else:
                handover.put(Token(token, reason, *log_probabilities(logits, token, request.logprobs), *how))
            if reason is not None:
                return
            with timings.decode.measure():
                logits = model.decode(token)

    def _score(self, prompt: Sequence[int], logprobs: int, handover: Handover[list[Token]]) -> None:
        tokens = [Token(prompt[0])]
        rows = self._model.logits_before(prompt, self._cancelled(handover))
        for token, logits in zip(prompt[1:], rows, strict=True):
            tokens.append(Token(token, None, *log_probabilities(logits, token, logprobs)))
        self._counters.scored_tokens += len(prompt)
        handover.put(tokens)

    def _embed(self, prompt: Sequence[int], handover: Handover[list[float]]) -> None:
        vector, reused = self._model.embed(prompt, self._cancelled(handover))
        self._counters.prompt_tokens += len(prompt)
        self._counters.reused_tokens += reused
        handover.put(vector.tolist())

    def _cancelled(self, handover: Handover[T]) -> Callable[[], bool]:
        def cancelled() -> bool:
            self._health.working()  # asked between two calls of the library
            return handover.cancelled or self._closed

        return cancelled

    def _check_books(self) -> None:
        self._model.check_integrity()
        counters = self._counters
        if min(asdict(counters).values()) < 0 or counters.cancelled > counters.requests:
            raise EngineError(f"counters do not add up: {counters}")
