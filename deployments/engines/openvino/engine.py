"""The openvino engine: many sequences at once over OpenVINO's paged attention, by nibble's own scheduler.

Logits come back to nibble, so that sampling, masks, log probabilities, seeds, scores and embeddings are those of every
other engine. One thread owns the model; each turn of its loop takes what came in and runs one step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from cluster.errors import EngineError
from cluster.machine.isa import available_cores, available_memory, cpu_flags
from cluster.model_config import OpenvinoConfig
from cluster.serve_settings import SERVE_LOGGER
from deployments.cores import check_cores
from deployments.engines.base import Token, TokenRequest
from deployments.engines.cache_memory import trim_heap
from deployments.engines.handover import Handover, closed_error
from deployments.engines.health import EngineHealth
from deployments.engines.openvino.batching.batch import Batch
from deployments.engines.openvino.batching.draft_model import DraftModel
from deployments.engines.openvino.batching.jobs import EmbedJob, GenerateJob, Job, ScoreJob
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS, BlockPool
from deployments.engines.openvino.batching.prompt_lookup import PromptLookup
from deployments.engines.openvino.batching.scheduler import Guesser, Scheduler
from deployments.engines.openvino.code_pages import scatter_code
from deployments.engines.openvino.derived_weights import derived_weights
from deployments.engines.openvino.paged_model import PagedModel, PagedSettings, Work
from deployments.engines.openvino.probe import choose_settings
from deployments.engines.openvino.stages import Stages
from deployments.engines.products.layout import wants_tiles
from deployments.engines.requests import check_prompt, check_request

logger = logging.getLogger(SERVE_LOGGER)

# Of what is free at start, at most, for the caches of all replicas that fit on a node, where their size was not
# configured. Each has its share by its threads: replicas that start together see the same memory free.
SHARE_OF_MEMORY = 0.25
# nibble's own products take Python's interpreter for an instant, some hundred times a step. By default another thread
# that is busy with it (the replica's event loop) would give it back after 5 ms only.
SWITCH_S = 0.0005
COMPILED_AT_LOAD = 16  # tokens of a step: OpenVINO's kernels for more are compiled when needed, for some milliseconds


class OpenvinoEngine:
    name = "openvino"

    def __init__(
        self,
        folder: Path,
        threads: int,
        context: int,
        max_running: int,
        options: OpenvinoConfig,
        cores: Sequence[int] | None = None,
        draft: Path | None = None,
    ) -> None:
        """Loads the artifact in `folder` with `threads` threads on `cores` (by default all that the process may use),
        for at most `max_running` sequences in a step. `draft`: the artifact's folder of the model of `options.draft`.

        Raises EngineError for threads and cores that this process has not, a context that a model has not, a KV
        cache too small for one sequence, and what OpenVINO cannot compile; ArtifactError for a damaged artifact.
        """
        self.threads, self.context = threads, context
        self.cores = check_cores(threads, cores)
        self._node_cores = max(threads, available_cores())  # now: the engine's own thread will have its cores only
        self._options, self._max_running = options, max_running
        self._incoming: deque[Job | Callable[[], None]] = deque()
        self._came = threading.Condition()
        self._closed = False
        self._health = EngineHealth()
        self._populated = False  # whether the KV cache has all its memory
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="openvino")
        try:
            self._batch = self._worker.submit(self._load, folder, draft).result()
        except BaseException:
            self._worker.shutdown()
            raise
        self._worker.submit(self._run)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
        """See Engine.generate. Raises InvalidRequestError for a prompt or max_tokens that cannot be served."""
        check_request(request, self.context, self.vocab_size)
        handover: Handover[Token] = Handover(asyncio.get_running_loop())
        with self._submitted(GenerateJob(request, self.context, handover)):
            while True:
                tokens = await handover.take()
                yield tokens
                if tokens[-1].finish_reason is not None:
                    return

    async def score(self, prompt: Sequence[int], logprobs: int) -> list[Token]:
        """See Engine.score. Raises InvalidRequestError for a prompt that cannot be served."""
        check_prompt(prompt, self.context, self.vocab_size)
        handover: Handover[list[Token]] = Handover(asyncio.get_running_loop())
        with self._submitted(ScoreJob(prompt, logprobs, handover)):
            return (await handover.take())[0]

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """See Engine.embed. Raises InvalidRequestError for a prompt that cannot be served."""
        check_prompt(prompt, self.context, self.vocab_size)
        handover: Handover[list[float]] = Handover(asyncio.get_running_loop())
        with self._submitted(EmbedJob(prompt, handover)):
            return (await handover.take())[0]

    def info(self) -> dict[str, str | int | float]:
        settings = self._settings
        return {
            "engine": self.name,
            "precision": settings.precision + (", 8-bit activations" if settings.quantized_activations else ""),
            "products": self._products,
            "threads": self.threads,
            "cores": ",".join(str(core) for core in self.cores),
            "context": self.context,
            "kv_cache_tokens": self._pool.size * BLOCK_TOKENS,
            "kv_cache_populated": self._populated,
            "kv_cache_usage": 1 - self._pool.free / self._pool.size,
            "running": self._batch.running,
            "waiting": self._batch.waiting + len(self._incoming),
            **asdict(self._batch.counters),
        }

    def check_health(self, stall_s: float | None) -> None:
        self._health.check(stall_s)

    def check_integrity(self) -> None:
        """Raises EngineError where the engine's books do not add up. Waits for the end of the running step."""
        checked: Future[None] = Future()

        def check() -> None:
            try:
                self._batch.check_integrity()
                checked.set_result(None)
            except EngineError as error:
                checked.set_exception(error)

        self._send(check)
        checked.result()

    def close(self) -> None:
        """Ends all sequences after the running step and frees the model's memory."""
        if self._closed:
            return
        with self._came:
            self._closed = True
            self._came.notify()
        self._worker.shutdown(wait=True)
        self._batch.drop(closed_error())
        del self._batch, self._populating
        for model in self._models:
            model.close()

    def _load(self, folder: Path, draft: Path | None) -> Batch:
        # Before OpenVINO starts its threads: they inherit the mask of this one.
        os.sched_setaffinity(0, self.cores)
        options, self._stages = self._options, Stages()
        paged, self._pool = self._model(folder, "this model", options.kv_cache)
        self.vocab_size = paged.vocab_size
        self._settings, self._products = paged.settings, paged.products
        self._models = [paged]
        guesser: Guesser | None = PromptLookup(options.prompt_lookup) if options.prompt_lookup else None
        if draft and options.draft:
            drafting, pool = self._model(draft, "its draft model", settings=self._settings)
            self._models.append(drafting)
            guesser = DraftModel(drafting, pool, options.draft.tokens, options.step_tokens, self.vocab_size)
        with self._stages.stage("code pages"):
            scatter_code()
        logger.info("openvino: %s is loaded: %s", folder.name, self._stages)
        if paged.products == "nibble":
            sys.setswitchinterval(SWITCH_S)
        self._populating = chain.from_iterable(model.populate() for model in self._models)
        return Batch(paged, Scheduler(self._pool, options.step_tokens, self._max_running, guesser))

    def _model(
        self, folder: Path, role: str, kv_cache: int | None = None, settings: PagedSettings | None = None
    ) -> tuple[PagedModel, BlockPool]:
        """Ready for its first step, with a KV cache of `kv_cache` bytes, and with the fastest settings unless they are
        given. `role`: what errors call it."""
        stage = self._stages.stage
        with stage("weights"):
            weights, model = derived_weights(folder, in_tiles=wants_tiles(self._options.tune, cpu_flags()))
        if not 1 <= self.context <= (model.context or self.context):
            raise EngineError(f"context: found {self.context}, allowed for {role} is 1 to {model.context}")
        with stage("settings"):
            settings = settings or choose_settings(weights, model, self.threads, self._options.tune)
        with stage("compile"):
            paged = PagedModel(weights, model, self.threads, settings)
        self._check_kv_cache(paged.block_bytes, kv_cache)
        with stage("first steps"):
            self._first_steps(paged)
        pool = BlockPool(self._blocks(paged, kv_cache))
        paged.allocate(pool.size)
        return paged, pool

    def _first_steps(self, paged: PagedModel) -> None:
        """A damaged model fails here, not at the first request. With a small cache: OpenVINO's products pack their
        weights in the first step, and only then is it known what memory is left for the real one."""
        longest = min(self._options.step_tokens, self.context)
        blocks = self._blocks_of(max(longest, COMPILED_AT_LOAD))
        paged.allocate(blocks)
        # OpenVINO has kernels for each number of tokens, which the first step of so many compiles; nibble's products
        # have one for all, and a long step of a large model takes seconds.
        together = min(self._max_running, COMPILED_AT_LOAD, self.context)
        for count in (longest, *range(1, together + 1)) if paged.products == "openvino" else (1,):
            paged.step([Work([0] * count, 0, range(blocks), [count - 1])])
        paged.unload_packed()
        trim_heap()

    @staticmethod
    def _blocks_of(tokens: int) -> int:
        return -(-tokens // BLOCK_TOKENS)

    def _blocks(self, paged: PagedModel, kv_cache: int | None) -> int:
        if kv_cache is not None:
            return int(kv_cache) // paged.block_bytes
        needed = self._blocks_of(self.context)
        # The kernel counts pages of a mapped file as available, but the weights are wanted in memory.
        left = max(0, available_memory() - paged.mapped_bytes)
        share = SHARE_OF_MEMORY * left * self.threads / self._node_cores
        return max(needed, min(needed * self._max_running, int(share) // paged.block_bytes))

    def _check_kv_cache(self, block_bytes: int, kv_cache: int | None) -> None:
        needed = self._blocks_of(self.context) * block_bytes
        if kv_cache is not None and int(kv_cache) // block_bytes * block_bytes < needed:
            raise EngineError(
                f"openvino.kv_cache: found {kv_cache} bytes, allowed are {needed} and more: what one"
                f" sequence of {self.context} tokens needs"
            )

    @contextmanager
    def _submitted(self, job: Job) -> Iterator[None]:
        self._send(job)
        try:
            yield
        finally:
            job.handover.cancel()  # it is dropped before the next step, unless it has ended

    def _send(self, item: Job | Callable[[], None]) -> None:
        with self._came:
            if self._closed:
                raise closed_error()
            if self._health.ended is not None:
                self._health.check(None)
            self._incoming.append(item)
            self._came.notify()

    def _run(self) -> None:
        """Whatever ends the loop ends all requests, now and later: nobody waits for an engine that is no more."""
        try:
            self._loop()
        except BaseException as error:
            logger.critical("openvino: the engine has ended", exc_info=error)
            with self._came:
                self._health.ended = error
                incoming = list(self._incoming)
            failure = EngineError(f"the engine has ended: {type(error).__name__}: {error}")
            self._batch.drop(failure)
            for item in incoming:
                if isinstance(item, Job):
                    item.handover.fail(failure)
        finally:
            self._health.idle()

    def _loop(self) -> None:
        batch = self._batch
        while True:
            with self._came:
                while self._populated and not self._incoming and not batch.jobs and not self._closed:
                    self._came.wait()
                incoming = list(self._incoming)
                if self._closed:
                    break
            for item in incoming:
                if isinstance(item, Job):
                    batch.add(item)
                else:
                    item()
                self._incoming.popleft()  # only now: where this raises, nobody is forgotten
            if not batch.jobs:
                self._populated = next(self._populating, True) is True
                continue
            self._health.working()
            try:
                batch.step()
                self._health.succeeded()
            except Exception as error:  # noqa: BLE001 - it is raised again in the tasks that wait for the sequences
                self._health.failed(error)
                batch.drop(error)
            self._health.idle()
        for item in incoming:
            if isinstance(item, Job):
                item.handover.fail(closed_error())
            else:
                item()
