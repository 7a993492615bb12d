"""The batch's books at the moment when a request's end reaches who waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from cluster.errors import EngineError
from deployments.engines.base import Token, TokenRequest
from deployments.engines.handover import Handover
from deployments.engines.openvino.batching.batch import Batch
from deployments.engines.openvino.batching.jobs import EmbedJob, GenerateJob, Job, ScoreJob
from deployments.engines.openvino.batching.paged_cache import BlockPool
from deployments.engines.openvino.batching.scheduler import Scheduler
from deployments.engines.openvino.paged_model import PagedModel, Work
from deployments.records import SamplingParams

VOCABULARY, CONTEXT, BLOCKS, NEXT = 20, 64, 8, 7
PROMPT = [1, 2, 3, 4, 5]


class Model:
    """Always says that NEXT follows; `fails` from the second step on."""

    def __init__(self, fails: bool = False) -> None:
        self._fails, self._steps = fails, 0

    def step(self, works: Sequence[Work]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        self._steps += 1
        if self._fails and self._steps == 2:
            raise EngineError("the model failed")
        rows = sum(len(work.rows) for work in works)
        logits = np.zeros((rows, VOCABULARY), np.float32)
        logits[:, NEXT] = 1
        return logits, np.zeros((rows, 4), np.float32)


class Taker:
    """In the handover's place: looks at the books whenever something arrives."""

    cancelled = False

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look = look
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self.seen: list[Any] = []

    def put(self, *items: Any) -> None:
        self.results += items
        self.seen.append(self._look())

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self.seen.append(self._look())


class Books:
    def __init__(self, model: Model, max_running: int = 4) -> None:
        self.pool = BlockPool(BLOCKS)
        self.batch = Batch(cast(PagedModel, model), Scheduler(self.pool, 32, max_running))
        self.taker = Taker(lambda: (len(self.batch.jobs), self.pool.free, self.batch.counters.generated_tokens))

    @property
    def handover(self) -> Handover[Any]:
        return cast(Handover[Any], self.taker)

    def run(self, *jobs: Job) -> None:
        for job in jobs:
            self.batch.add(job)
        while self.batch.jobs:
            try:
                self.batch.step()
            except EngineError as error:
                self.batch.drop(error)
        self.batch.check_integrity()


def request(tokens: int) -> TokenRequest:
    return TokenRequest(PROMPT, tokens, SamplingParams(temperature=0))


def test_with_the_last_token_a_request_is_counted_and_its_blocks_are_free() -> None:
    books = Books(Model())
    books.run(GenerateJob(request(3), CONTEXT, books.handover))
    assert books.taker.results == [Token(NEXT), Token(NEXT), Token(NEXT, "length")]
    assert books.taker.seen == [(1, BLOCKS - 1, 1), (1, BLOCKS - 1, 2), (0, BLOCKS, 3)]


def test_a_first_token_tells_how_long_it_waited_and_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two requests, of which the second waits for a step; the clock ticks once each time it is looked at."""
    ticks = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    books = Books(Model(), max_running=1)
    books.run(*(GenerateJob(request(2), CONTEXT, books.handover) for _ in range(2)))
    first, _, second, _ = books.taker.results
    assert 0 < first.queued_s < second.queued_s
    assert first.prefill_s == second.prefill_s > 0
    assert [(token.queued_s, token.prefill_s) for token in books.taker.results[1::2]] == [(0, 0)] * 2


@pytest.mark.parametrize("job", [EmbedJob, lambda prompt, handover: ScoreJob(prompt, 0, handover)])
def test_with_its_only_result_a_request_is_over(job: Callable[[list[int], Handover[Any]], Job]) -> None:
    books = Books(Model())
    books.run(job(PROMPT, books.handover))
    assert books.taker.seen[-1] == (0, BLOCKS, 0)
    assert len(books.taker.results) == 1


def test_with_a_failed_step_all_its_requests_are_over() -> None:
    books = Books(Model(fails=True))
    books.run(*(GenerateJob(request(3), CONTEXT, books.handover) for _ in range(2)))
    assert [str(error) for error in books.taker.errors] == ["the model failed"] * 2
    assert books.taker.seen[-2:] == [(0, BLOCKS, 2)] * 2


def test_with_its_own_error_a_request_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("of this request")

    books = Books(Model())
    monkeypatch.setattr(GenerateJob, "receive", fail)
    books.run(GenerateJob(request(3), CONTEXT, books.handover))
    assert [str(error) for error in books.taker.errors] == ["of this request"]
    assert books.taker.seen == [(0, BLOCKS, 0)]
