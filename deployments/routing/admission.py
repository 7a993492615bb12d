"""Admission: which of a model's completions go to its replicas now, which wait, and which are refused.

One queue a model in each router. The replicas get what they can hold; the rest waits here, in fair order
(`fair_queue.py`), so that Serve's own queue, first come first served, stays short and is only a backstop. Interactive
requests go before those of class batch. No Ray, no event loop and no clock of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

from cluster.errors import QueueFullError
from deployments.routing.fair_queue import FairQueue, FlowName

MAX_RETRY_S = 600
# The rate is that of about so many of the last completions.
RATE_COMPLETIONS = 32

# The queue is full of requests or of tokens, the start would be too late, or what waited gave its place to another one.
Reason = Literal["requests", "tokens", "deadline", "displaced"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Bounds(NamedTuple):
    """Of what waits: completions, and their estimated tokens. An empty queue takes a completion of any size."""

    max_queued: int
    max_queued_tokens: int


class QueuePlace:
    """One completion's place: it waits, runs, and is left. `wake` is called when it starts or is refused, with an error
    in `refusal`. `kept`: it is a further completion of a request that has begun, which is refused no more."""

    def __init__(self, flow: FlowName, work: int, batch: bool, kept: bool, entered_at: float) -> None:
        self.flow, self.work, self.batch, self.kept = flow, max(1, work), batch, kept
        self.entered_at = entered_at
        self.started_at: float | None = None
        self.refusal: Exception | None = None
        self.wake: Callable[[], None] = lambda: None

    @property
    def waited_s(self) -> float:
        """Of a place that has started; 0 where it found room."""
        return 0.0 if self.started_at is None else self.started_at - self.entered_at


class AdmissionQueue:
    """`capacity`: how many completions this router may have at the replicas at once; it may change at any time, and is
    0 while the model is to start its first replica. `clock`: seconds."""

    def __init__(self, model: str, capacity: Callable[[], int], bounds: Bounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self._model = model
        self._capacity = capacity
        self._clock = clock
        self._interactive: FairQueue[QueuePlace] = FairQueue()
        self._batch: FairQueue[QueuePlace] = FairQueue()
        self._running: dict[QueuePlace, None] = {}  # in the order of their start
        self.refusals: Counter[Reason] = Counter()  # so far
        self._work = self._seconds = 0.0  # of ended completions, the older ones with less weight

    def __len__(self) -> int:
        """Completions that wait."""
        return len(self._interactive) + len(self._batch)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        return self._interactive.work + self._batch.work

    def rate(self) -> float | None:
        """Estimated tokens a second with all of the capacity in use; None before anything has ended, or where there is
        no capacity. By Little's law: what `capacity` completions at once get done in the time that one takes."""
        rate = self.completion_rate()
        return None if rate is None else self._capacity() * rate or None

    def completion_rate(self) -> float | None:
        """Estimated tokens a second of one completion; None before any has ended."""
        return self._work / self._seconds if self._seconds > 0 else None

    def enter(
        self, flow: FlowName, work: int, batch: bool = False, within_s: float | None = None, kept: bool = False
    ) -> QueuePlace:
        """A place that has started where there is room, else one that waits. `work`: estimated tokens. Raises
        QueueFullError where the queue is full, or the place could not start within `within_s` seconds."""
        self.start_waiting()
        place = QueuePlace(flow, work, batch, kept, self._clock())
        if not len(self) and len(self._running) < self._capacity():
            self._lane(place).start(place)
            self._start(place, place.entered_at)
            return place
        if not kept:
            self._check_deadline(place, within_s)
            self._make_room(place)
        self._lane(place).push(place)
        return place

    def leave(self, place: QueuePlace, tokens: int | None = None, measured: bool = True) -> None:
        """Frees the place, whether it waits or runs; a second time does nothing. `tokens`: what it really took, None as
        estimated. `measured`: whether its time tells anything of the replicas' rate."""
        if place in self._running:
            del self._running[place]
            assert place.started_at is not None, "it runs"
            if measured:
                keep = 1 - 1 / RATE_COMPLETIONS
                self._work = self._work * keep + place.work
                self._seconds = self._seconds * keep + self._clock() - place.started_at
            self._lane(place).end(place, place.work if tokens is None else tokens)
        elif place.started_at is None and place.refusal is None:
            self._lane(place).remove(place)
            place.refusal = QueueFullError("the place was left")  # nobody waits for it
        self.start_waiting()

    def start_waiting(self) -> None:
        """Starts what there is room for. To be called also where `capacity` may have grown."""
        while len(self) and len(self._running) < self._capacity():
            place = (self._interactive if len(self._interactive) else self._batch).pop()
            self._start(place, self._clock())
            place.wake()

    def end(self, error: Exception) -> None:
        """All that waits is refused."""
        for place in self._waiting():
            self._refuse(place, error)

    def wait_s(self, flow: FlowName, batch: bool = False) -> float | None:
        """Seconds until a further completion of this flow would start, as far as the rate is known."""
        rate = self.rate()
        if rate is None:
            return None
        ahead = self._interactive.work + self._batch.work_ahead(flow) if batch else self._interactive.work_ahead(flow)
        # The first one starts when one of those that run has ended, which are anywhere between their start and end.
        next_end = sum(place.work for place in self._running) / (len(self._running) + 1)
        return (ahead + next_end) / rate

    def retry_after_s(self, flow: FlowName, batch: bool = False) -> int:
        """The wait that a request would meet that comes now, which under lasting load is that of one which comes later.
        Before anything has ended, as long as the oldest completion runs already."""
        wait = self.wait_s(flow, batch)
        if wait is None:
            oldest = next(iter(self._running), None)
            wait = self._clock() - oldest.started_at if oldest is not None and oldest.started_at is not None else 0.0
        return min(MAX_RETRY_S, max(1, math.ceil(wait)))

    def check_integrity(self) -> None:
        for lane in (self._interactive, self._batch):
            lane.check_integrity()
        assert all(place.started_at is not None for place in self._running)
        assert all(place.started_at is None and place.refusal is None for place in self._waiting())
        assert not len(self) or len(self._running) >= self._capacity()

    def _waiting(self) -> list[QueuePlace]:
        return [*self._interactive, *self._batch]

    def _lane(self, place: QueuePlace) -> FairQueue[QueuePlace]:
        return self._batch if place.batch else self._interactive

    def _start(self, place: QueuePlace, now: float) -> None:
        place.started_at = now
        self._running[place] = None

    def _refuse(self, place: QueuePlace, error: Exception) -> None:
        self._lane(place).remove(place)
        place.refusal = error
        place.wake()

    def _check_deadline(self, place: QueuePlace, within_s: float | None) -> None:
        wait = self.wait_s(place.flow, place.batch)
        if within_s is not None and wait is not None and wait > within_s:
            raise self._refused(
                place, "deadline", f"it would start in {wait:.0f} s, beyond the {within_s:g} s that it may take"
            )

    def _make_room(self, place: QueuePlace) -> None:
        """Where the queue is full, the last ones of batch give way to what is interactive, and those of a longer flow
        to a shorter one's: else the flow that asks most would have the queue to itself. Raises QueueFullError."""
        victims: list[QueuePlace] = []
        count, tokens = len(self) + 1, self.queued_tokens + place.work
        candidates = iter(self._giving_way(place))
        while count > self.bounds.max_queued or (count > 1 and tokens > self.bounds.max_queued_tokens):
            victim = next(candidates, None)
            if victim is None:
                raise self._full(place)
            victims.append(victim)
            count, tokens = count - 1, tokens - victim.work
        for victim in victims:
            why = "the queue is full, and its place went to a request that goes before it"
            self._refuse(victim, self._refused(victim, "displaced", why))

    def _giving_way(self, place: QueuePlace) -> Sequence[QueuePlace]:
        """In this order."""
        found: list[QueuePlace] = []
        if not place.batch:
            found += last_ones(self._batch, 0)
        return found + last_ones(self._lane(place), self._lane(place).queued(place.flow) + place.work)

    def _full(self, place: QueuePlace) -> QueueFullError:
        if len(self) >= self.bounds.max_queued:
            return self._refused(place, "requests", f"{len(self)} requests wait already (queue.max_queued)")
        found = f"{self.queued_tokens} tokens of work wait already, and this is {place.work} more"
        allowed = f"allowed are {self.bounds.max_queued_tokens} (queue.max_queued_tokens)"
        return self._refused(place, "tokens", f"{found}, {allowed}")

    def _refused(self, place: QueuePlace, reason: Reason, why: str) -> QueueFullError:
        self.refusals[reason] += 1
        retry = self.retry_after_s(place.flow, place.batch)
        return QueueFullError(f"model {self._model}: {why}; try again in {retry} s", retry)


def last_ones(lane: FairQueue[QueuePlace], longer_than: int) -> list[QueuePlace]:
    """Waiting places, the last of the longest flow first, as long as a flow stays longer than so many tokens."""
    found = []
    for work, places in lane.by_length():
        for place in reversed(places):
            if work <= longer_than:
                break
            if not place.kept:
                found.append(place)
                work -= place.work
    return found
