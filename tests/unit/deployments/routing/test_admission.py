"""What starts, waits and is refused, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cluster.errors import QueueFullError, UnavailableError
from deployments.routing.admission import MAX_RETRY_S, AdmissionQueue, Bounds, QueuePlace
from tests.examples import examples

LOOSE = Bounds(1 << 20, 1 << 40)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Capacity:
    def __init__(self, places: int) -> None:
        self.places = places

    def __call__(self) -> int:
        return self.places


def queue_of(places: int = 1, bounds: Bounds = LOOSE, clock: Clock | None = None) -> AdmissionQueue:
    return AdmissionQueue("m", Capacity(places), bounds, clock or Clock())


def started(*places: QueuePlace) -> list[bool]:
    return [place.started_at is not None for place in places]


def serve(queue: AdmissionQueue, place: QueuePlace) -> None:
    queue.leave(place, place.work)


def order(queue: AdmissionQueue, first: QueuePlace, places: list[QueuePlace]) -> list[QueuePlace]:
    """In which the places start, one at a time, from when `first` is served."""
    found, current = [], first
    while len(queue):
        serve(queue, current)
        (current,) = (place for place in places if place.started_at is not None and place not in found)
        found.append(current)
    return found


def test_what_finds_room_starts_at_once_and_the_rest_in_order() -> None:
    queue = queue_of(places=2)
    a, b, c, d = (queue.enter(None, 10) for _ in range(4))
    assert started(a, b, c, d) == [True, True, False, False]
    serve(queue, b)
    assert started(c, d) == [True, False]
    assert (len(queue), queue.running, queue.queued_tokens) == (1, 2, 10)


def test_a_place_that_starts_wakes_its_request_once() -> None:
    queue, woken = queue_of(), []
    running, waiting = queue.enter(None, 10), queue.enter(None, 10)
    waiting.wake = lambda: woken.append(waiting.started_at)
    serve(queue, running)
    serve(queue, running)
    assert woken == [1000.0]


def test_leaving_frees_a_place_and_the_queues_room() -> None:
    queue = queue_of(bounds=Bounds(2, 1 << 20))
    running, waiting, last = (queue.enter(None, 10) for _ in range(3))
    with pytest.raises(QueueFullError):
        queue.enter(None, 10)
    queue.leave(waiting)
    queue.leave(waiting)
    assert (len(queue), queue.queued_tokens) == (1, 10)
    queue.enter(None, 10)
    queue.leave(running)
    assert started(waiting, last) == [False, True]


def test_capacity_that_grows_is_used_where_it_is_looked_at() -> None:
    capacity = Capacity(1)
    queue = AdmissionQueue("m", capacity, LOOSE, Clock())
    _, b, c = (queue.enter(None, 10) for _ in range(3))
    capacity.places = 3
    assert started(b, c) == [False, False]
    queue.start_waiting()
    assert started(b, c) == [True, True]


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    queue = queue_of(bounds=Bounds(2, 100))
    queue.enter(None, 10)
    queue.enter(None, 60)
    with pytest.raises(QueueFullError, match=r"60 tokens of work wait already, and this is 41 more, allowed are 100"):
        queue.enter(None, 41)
    queue.enter(None, 40)
    with pytest.raises(QueueFullError, match=r"model m: 2 requests wait already \(queue.max_queued\); try again in"):
        queue.enter(None, 1)
    assert queue.refusals == {"requests": 1, "tokens": 1}


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    queue = queue_of(bounds=Bounds(1, 100))
    queue.enter(None, 10)
    assert len(queue) == 0
    queue.enter(None, 1000)
    assert len(queue) == 1


def test_what_belongs_to_a_request_that_has_begun_is_not_refused_and_gives_no_way() -> None:
    queue = queue_of(bounds=Bounds(1, 100))
    queue.enter("a", 10)
    kept = [queue.enter("a", 90, kept=True) for _ in range(3)]
    with pytest.raises(QueueFullError):
        queue.enter("b", 10)
    assert all(place.refusal is None for place in kept)


def test_interactive_goes_before_batch_and_takes_its_room() -> None:
    queue = queue_of(bounds=Bounds(2, 1 << 20))
    running = queue.enter(None, 10)
    batch = [queue.enter(None, 10, batch=True) for _ in range(2)]
    woken: list[bool] = []
    batch[1].wake = lambda: woken.append(True)
    interactive = queue.enter(None, 10)
    with pytest.raises(QueueFullError, match="its place went to a request that goes before it"):
        raise batch[1].refusal or AssertionError
    assert queue.refusals == {"displaced": 1}
    assert woken == [True]
    with pytest.raises(QueueFullError):
        queue.enter(None, 10, batch=True)
    assert order(queue, running, [*batch, interactive]) == [interactive, batch[0]]


def test_a_shorter_flow_takes_the_room_of_the_longest_ones_last() -> None:
    queue = queue_of(bounds=Bounds(4, 1 << 20))
    running = queue.enter("a", 10)
    heavy = [queue.enter("a", 10) for _ in range(4)]
    light = [queue.enter("b", 10) for _ in range(2)]
    assert [place.refusal is not None for place in heavy] == [False, False, True, True]
    with pytest.raises(QueueFullError):
        queue.enter("b", 10)  # it would be the longer one
    # b was served nothing yet.
    assert order(queue, running, [*heavy[:2], *light]) == [light[0], heavy[0], light[1], heavy[1]]


def test_a_flow_is_charged_with_what_it_really_took() -> None:
    queue = queue_of()
    running = queue.enter("a", 100)
    waiting = [queue.enter(flow, 100) for flow in "abab"]
    queue.leave(running, 1)  # so that a has taken next to nothing
    assert started(*waiting) == [False, True, False, False]
    queue.leave(waiting[1], 100)
    assert started(*waiting) == [True, True, False, False]
    queue.leave(waiting[0], 1)
    assert started(*waiting) == [True, True, True, False]


def test_idle_time_earns_nothing() -> None:
    queue = queue_of()
    running = queue.enter("a", 10)
    for _ in range(50):  # a alone
        following = queue.enter("a", 10)
        serve(queue, running)
        running = following
    waiting = [queue.enter(flow, 10) for flow in "bbbbaaaa"]
    assert sorted(place.flow or "" for place in order(queue, running, waiting)[:4]) == ["a", "a", "b", "b"]


def test_what_cannot_start_in_time_is_refused_at_once() -> None:
    clock = Clock()
    queue = queue_of(clock=clock)
    first = queue.enter(None, 100)
    assert queue.rate() is None
    queue.enter(None, 100, within_s=0.001)  # nothing is known yet
    clock.now += 10
    serve(queue, first)
    assert queue.rate() == 10
    queue.enter(None, 100, within_s=11)
    with pytest.raises(QueueFullError, match="it would start in 15 s, beyond the 14 s that it may take") as refused:
        queue.enter(None, 100, within_s=14)
    assert refused.value.retry_after_s == 15
    assert queue.refusals == {"deadline": 1}
    queue.enter(None, 100, within_s=15)
    queue.enter(None, 100)


def test_retry_after_is_whole_seconds_within_bounds() -> None:
    clock = Clock()
    queue = queue_of(clock=clock)
    assert queue.retry_after_s(None) == 1
    running = queue.enter(None, 100)
    clock.now += 6.5
    assert queue.retry_after_s(None) == 7, "as long as the oldest one runs already"
    serve(queue, running)
    for work in (10, 30):
        queue.enter(None, work)
    assert queue.retry_after_s(None) == 3  # 30 tokens, and half of 10, at 15.4 a second
    queue.enter(None, 1 << 30)
    assert queue.retry_after_s(None) == MAX_RETRY_S
    assert queue.retry_after_s("another") < MAX_RETRY_S


def test_a_completion_that_failed_tells_nothing_of_the_rate() -> None:
    clock = Clock()
    queue = queue_of(clock=clock)
    queue.leave(queue.enter(None, 100), measured=False)
    assert queue.rate() is None


def test_when_the_server_ends_what_waits_is_told() -> None:
    queue = queue_of()
    running, a, b = queue.enter(None, 1), queue.enter(None, 1), queue.enter("x", 1, batch=True)
    error = UnavailableError("shutting down")
    queue.end(error)
    assert [running.refusal, a.refusal, b.refusal] == [None, error, error]
    for place in (running, a, b):
        queue.leave(place)
    assert (len(queue), queue.running) == (0, 0)


class Machine(RuleBasedStateMachine):
    """Any order of arrivals, ends and changes of the capacity keeps the sums right and the bounds held."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.capacity = Clock(), Capacity(2)
        self.queue = AdmissionQueue("m", self.capacity, Bounds(5, 500), self.clock)
        self.known: list[QueuePlace] = []
        self.told: list[tuple[bool, int]] = []  # of refusals

    @rule(
        target=places,
        flow=st.sampled_from(["a", "b", None]),
        work=st.integers(0, 300),
        batch=st.booleans(),
        within_s=st.none() | st.floats(0, 100),
        kept=st.booleans(),
    )
    def enter(self, flow: str | None, work: int, batch: bool, within_s: float | None, kept: bool) -> QueuePlace | None:
        try:
            place = self.queue.enter(flow, work, batch, within_s, kept)
        except QueueFullError as error:
            self.told.append((kept, error.retry_after_s))
            return None
        place.wake = lambda: self.known.append(place)
        return place

    @rule(place=consumes(places), tokens=st.integers(0, 500), seconds=st.floats(0, 10))
    def leave(self, place: QueuePlace | None, tokens: int, seconds: float) -> None:
        self.clock.now += seconds
        if place is not None:
            self.queue.leave(place, tokens)

    @rule(places=st.integers(1, 4))
    def change_capacity(self, places: int) -> None:
        self.capacity.places = places
        self.queue.start_waiting()

    @invariant()
    def right(self) -> None:
        self.queue.check_integrity()
        waiting = self.queue._waiting()
        bound = [place for place in waiting if not place.kept]
        assert len(bound) <= 5
        assert len(waiting) <= 1 or sum(place.work for place in bound) <= 500 or len(bound) <= 1
        assert all(not kept and 1 <= seconds <= MAX_RETRY_S for kept, seconds in self.told)
        assert all(self.known.count(place) == 1 for place in self.known), "woken once"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=examples(60, 400), stateful_step_count=40, deadline=None)


def test_a_big_request_among_small_ones_does_not_starve() -> None:
    clock = Clock()
    queue = queue_of(clock=clock)
    running = queue.enter("small", 10)
    big = queue.enter("big", 100_000)
    for _ in range(20):
        following = queue.enter("small", 10)
        serve(queue, running)
        if big.started_at is not None:
            break
        running = following
    assert big.started_at is not None
    running = big
    small = [following, *(queue.enter("small", 10) for _ in range(5))]
    again = queue.enter("big", 10)
    assert order(queue, running, [*small, again])[-1] is again, "and is paid for"
