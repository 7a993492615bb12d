"""One step of continuous batching: schedule, run the graph, hand out what came of it. In one thread at a time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from cluster.errors import EngineError
from deployments.engines.base import Logits
from deployments.engines.openvino.batching.jobs import Hidden, Job, ScoreJob
from deployments.engines.openvino.batching.scheduler import PromptPiece, Scheduler
from deployments.engines.openvino.paged_model import PagedModel, Work


@dataclass
class BatchCounters:
    """`reused_tokens`: of prompts, taken from the KV cache. `guessed_tokens` were looked up in the text so far
    or drafted, `accepted_tokens` of them were right. `cancelled`: of `requests`. `steps`: runs of the graph,
    which took `step_s` seconds together. `first_token_s`: from when a request was asked for to its first token, of all
    together."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    scored_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    cancelled: int = 0
    steps: int = 0
    step_s: float = 0.0
    first_token_s: float = 0.0


class Batch:
    """The sequences under way on one model."""

    def __init__(self, model: PagedModel, scheduler: Scheduler[Job]) -> None:
        self.counters = BatchCounters()
        self._model, self._scheduler = model, scheduler

    @property
    def running(self) -> int:
        """Sequences that are let in."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def jobs(self) -> list[Job]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def add(self, job: Job) -> None:
        self.counters.requests += 1
        self._scheduler.add(job)

    def step(self) -> None:
        """Raises EngineError where the model fails; call `drop` then."""
        for job in self.jobs:
            if job.handover.cancelled:
                self.counters.cancelled += 1
                self._scheduler.remove(job)
        pieces = self._scheduler.step()
        if not pieces:
            return
        rows = [piece.sequence.rows(piece) for piece in pieces]
        works = [Work(p.tokens, p.start, p.sequence.table, wanted) for p, wanted in zip(pieces, rows, strict=True)]
        started = time.monotonic()
        for piece in pieces:
            if piece.sequence.begun is None:
                piece.sequence.begun = started
        logits, hidden = self._model.step(works)
        self.counters.steps += 1
        self.counters.step_s += time.monotonic() - started
        # The youngest first: who waits for a first token has it before the later ones of others are on their way.
        start = len(logits)
        for piece, wanted in zip(reversed(pieces), reversed(rows), strict=True):
            start, stop = start - len(wanted), start
            self._receive(piece, logits[start:stop], hidden[start:stop])

    def drop(self, error: BaseException) -> None:
        """Ends all sequences with the error, and shares nothing of what was computed."""
        dropped = self.jobs
        for job in dropped:
            self._scheduler.remove(job)
        self._scheduler.pool.forget()
        for job in dropped:
            job.handover.fail(error)

    def check_integrity(self) -> None:
        """Raises EngineError where the books do not add up."""
        self._scheduler.check_integrity()
        counters = self.counters
        if (
            min(asdict(counters).values()) < 0
            or counters.cancelled > counters.requests
            or counters.accepted_tokens > counters.guessed_tokens
        ):
            raise EngineError(f"counters do not add up: {counters}")

    def _receive(self, piece: PromptPiece[Job], logits: Logits, hidden: Hidden) -> None:
        job, counters, before = piece.sequence, self.counters, piece.sequence.new_tokens
        try:
            received = job.receive(piece, logits, hidden)
        except Exception as error:  # noqa: BLE001 - it is raised again in the task that waits for this sequence alone
            self._scheduler.remove(job)
            job.handover.fail(error)
            return
        if piece.last and before == 0:
            counters.reused_tokens += job.reused or 0
            if isinstance(job, ScoreJob):
                counters.scored_tokens += len(job.tokens)
            else:
                counters.prompt_tokens += piece.start + len(piece.tokens)
            if job.new_tokens:
                counters.first_token_s += time.monotonic() - job.came
        counters.generated_tokens += job.new_tokens - before
        counters.guessed_tokens += piece.guessed
        counters.accepted_tokens += received.computed - (piece.start + len(piece.tokens) - piece.guessed)
        self._scheduler.advance(job, received.computed)
        if received.ended:
            self._scheduler.remove(job)
        # Last, as with errors: who has a request's end finds it in the counters, and what it held is free again.
        job.handover.put(*received.results)
