"""Admission of one model's requests on the router's event loop: what finds room passes at once, the rest is awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

from cluster.errors import DeadlineError
from cluster.model_config import ModelConfig
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.admission import AdmissionQueue, Bounds, QueuePlace
from deployments.routing.work import WorkEstimate
from deployments.scaling import ModelLoad

# Seconds. While requests wait it is looked so often whether there are more replicas now.
LOOK_S = 1.0
# The same while there is none: a first token waits for it.
WAKE_LOOK_S = 0.1
# So long the autoscaling policy has to hear of what waits while there is no replica. After that Serve's own queue sees
# it, which starts one replica by itself.
HOLD_S = 5.0


class Caller(NamedTuple):
    """Who asks: the name of the API key, None without keys; `batch`: behind all interactive requests."""

    key: str | None = None
    batch: bool = False


class ModelAdmission:
    """`running`: how many replicas take requests; None or 0: none yet. With several routers each admits its part of
    what the replicas hold, and what the others leave. `wake`: called when a request finds no replica of a model that
    requests start."""

    def __init__(self, config: ModelConfig, running: Callable[[], int | None]) -> None:
        self._running = running
        self.estimate = WorkEstimate(config.context)
        self.queue = AdmissionQueue(config.name, self.capacity, bounds_of(config), time.monotonic)
        self._look_timer: asyncio.TimerHandle | None = None
        self._elsewhere: int | None = None
        self.wake: Callable[[], None] = lambda: None
        self._held_since: float | None = None  # while what waits is held back
        self._in_use = 0  # requests of any kind that are sent to the replicas
        self._used_at = time.monotonic()
        self.change(config)

    def change(self, config: ModelConfig, routers: int = 1) -> None:
        """To a new configuration; what waits goes on waiting."""
        self._max_ongoing, self._routers = config.max_ongoing, routers
        self._to_zero = config.replicas.min == 0
        self.queue.bounds, self.estimate.context = bounds_of(config), config.context

    def capacity(self) -> int:
        """Completions that this router may have at the replicas."""
        if self._held_since is not None and time.monotonic() < self._held_since + HOLD_S:
            return 0
        of_all = self._max_ongoing * max(1, self._running() or 0)
        part = -(-of_all // self._routers)
        return part if self._elsewhere is None else max(part, of_all - self._elsewhere)

    def elsewhere(self, running: int | None) -> None:
        """How many completions the other routers have at the replicas; None: it is not known."""
        self._elsewhere = running
        self.queue.start_waiting()

    async def admit(self, caller: Caller, work: int, timeout_s: float | None, kept: bool = False) -> QueuePlace:
        """A place that has started, to be given back by `queue.leave`. `kept`: of a request that has begun. Raises
        QueueFullError, at once or where the place is given to another one, and DeadlineError."""
        self._note_zero(entering=True)
        place = self.queue.enter(caller.key, work, caller.batch, timeout_s, kept)
        if place.started_at is None:
            await self._wait(place, timeout_s)
        return place

    @asynccontextmanager
    async def place(self, caller: Caller, work: int, timeout_s: float | None) -> AsyncGenerator[None, None]:
        """Around what is no completion. Raises as `admit` does."""
        place = await self.admit(caller, work, timeout_s)
        try:
            yield
        except Exception:
            self.queue.leave(place, 0, measured=False)
            raise
        finally:
            self.queue.leave(place)

    def leave(self, place: QueuePlace, request: GenerationRequest, last: GenerationChunk | None, failed: bool) -> None:
        """A completion has ended, or its client left it. `last`: of the chunks that came."""
        if last is None:
            self.queue.leave(place, 0 if failed else None, measured=not failed)
            return
        self.queue.leave(place, last.prompt_tokens + last.completion_tokens)
        self.estimate.learn(request.prompt, last.prompt_tokens, last.completion_tokens, last.finish_reason)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Around a request of any kind that is sent to the replicas."""
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            self._used_at = time.monotonic()

    def load(self) -> ModelLoad:
        """At this router."""
        queue = self.queue
        busy = self._in_use or queue.running or len(queue)
        idle_s = 0.0 if busy else time.monotonic() - self._used_at
        return ModelLoad(queue.running, len(queue), queue.queued_tokens, queue.completion_rate(), idle_s)

    def _note_zero(self, entering: bool = False) -> None:
        """What finds a model at zero is held back from when the first one came: the policy sees how much there is, and
        starts as many replicas as that needs."""
        if not self._to_zero or self._running():
            self._held_since = None
        elif entering and not len(self.queue):
            self._held_since = time.monotonic()
            self.wake()

    async def _wait(self, place: QueuePlace, timeout_s: float | None) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place.wake = lambda: set_done(woken)
        self._look_later()
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the result.
            done, _ = await asyncio.wait({woken}, timeout=timeout_s)
        except BaseException:
            self.queue.leave(place)
            raise
        if not done:
            self.queue.leave(place)
            raise DeadlineError(f"the request waited longer than the {timeout_s:g} s it was allowed")
        if place.refusal is not None:
            raise place.refusal

    def _look_later(self) -> None:
        if self._look_timer is None:
            pause = LOOK_S if self._running() else WAKE_LOOK_S
            self._look_timer = asyncio.get_running_loop().call_later(pause, self._look)

    def _look(self) -> None:
        self._look_timer = None
        self._note_zero()
        self.queue.start_waiting()
        if len(self.queue):
            self._look_later()


def set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def bounds_of(config: ModelConfig) -> Bounds:
    return Bounds(config.queue.max_queued, config.max_queued_tokens)
