"""Requests that wait for a place at a model's replicas: who starts, who is told what, and what is freed."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import DeadlineError, InvalidRequestError, QueueFullError, UnavailableError
from deployments.routing import model_admission
from deployments.routing.model_admission import Caller, ModelAdmission
from deployments.routing.sequences import OneSequence
from tests.unit.deployments.routing.held_model import HeldModel, asked, idle, request, until, whole
from tests.unit.fakes import EchoModel


def test_what_finds_room_passes_without_the_event_loop() -> None:
    model = EchoModel()
    stepping = OneSequence(model, request("a"), Caller()).begin()
    with pytest.raises(StopIteration):  # it ended without having waited for anything
        stepping.send(None)
    assert model.admission.queue.running == 1


async def test_what_waits_begins_when_a_place_is_free() -> None:
    model = HeldModel()
    first, second = asked(whole(model, request("a"))), asked(whole(model, request("b")))
    await until(lambda: len(model.admission.queue) == 1)
    assert model.begun == ["a"]
    model.gate.set()
    assert await first == await second == ["a ", "b "]
    assert model.begun == ["a", "b"]
    assert idle(model)


async def test_a_place_is_free_with_the_last_chunk() -> None:
    model = EchoModel()
    sequence = OneSequence(model, request("a"), Caller())
    await sequence.__anext__()
    assert not idle(model)
    await sequence.__anext__()
    assert idle(model)
    await sequence.aclose()


async def test_a_client_that_leaves_frees_its_place_waiting_or_running() -> None:
    model = HeldModel()
    first, second, third = (asked(whole(model, request(id))) for id in "abc")
    await until(lambda: len(model.admission.queue) == 2)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert len(model.admission.queue) == 1
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await until(lambda: model.begun == ["a", "c"])
    model.gate.set()
    assert await third == ["a ", "b "]
    assert idle(model)


async def test_a_client_that_leaves_as_its_place_starts_frees_it() -> None:
    model = HeldModel()
    running = await model.admission.admit(Caller(), 1, None)
    waiting = asked(model.admission.admit(Caller(), 1, None))
    await until(lambda: len(model.admission.queue) == 1)
    model.admission.queue.leave(running)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert idle(model)


async def test_a_full_queue_refuses_with_the_seconds() -> None:
    model = HeldModel(max_queued=1)
    waiting = [asked(whole(model, request(id))) for id in "ab"]
    await until(lambda: len(model.admission.queue) == 1)
    with pytest.raises(QueueFullError, match=r"model echo: 1 requests wait already") as refused:
        await whole(model, request("c"))
    assert refused.value.retry_after_s == 1
    model.gate.set()
    await asyncio.gather(*waiting)
    assert idle(model)


async def test_batch_gives_its_place_in_the_queue_to_what_is_interactive() -> None:
    model = HeldModel(max_queued=1)
    running, batch = asked(whole(model, request("a"))), asked(whole(model, request("b"), caller=Caller(batch=True)))
    await until(lambda: len(model.admission.queue) == 1)
    interactive = asked(whole(model, request("c")))
    with pytest.raises(QueueFullError):
        await batch
    model.gate.set()
    await asyncio.gather(running, interactive)
    assert model.begun == ["a", "c"]
    assert idle(model)


async def test_the_deadline_passes_while_waiting_and_counts_from_the_start() -> None:
    model = HeldModel(max_ongoing=1)
    running = asked(whole(model, request("a")))
    await until(lambda: model.begun == ["a"])
    with pytest.raises(DeadlineError, match=r"waited longer than the 0\.05 s"):
        await whole(model, request("b", timeout_s=0.05))
    later = asked(whole(model, request("c", timeout_s=60)))
    await until(lambda: len(model.admission.queue) == 1)
    await asyncio.sleep(0.01)
    model.gate.set()
    await asyncio.gather(running, later)
    left = model.requests[-1].timeout_s
    assert left is not None
    assert left < 60
    assert idle(model)


async def test_a_deadline_after_a_wait_says_what_was_allowed_in_all() -> None:
    model = HeldModel()
    running = asked(whole(model, request("a")))
    await until(lambda: model.begun == ["a"])
    later = asked(whole(model, request("b", timeout_s=60)))
    await until(lambda: len(model.admission.queue) == 1)
    await asyncio.sleep(0.001)
    model.gate.set()
    await running
    model.error = DeadlineError("the request took longer than the 59.9 s it was allowed")
    with pytest.raises(DeadlineError, match=r"longer than the 60 s it was allowed, of which it waited 0\.[0-9] s"):
        await later


async def test_a_request_that_fails_frees_its_place_and_tells_the_rate_once_it_had_begun() -> None:
    model = EchoModel()
    for error_at, measured in ((0, False), (1, True)):
        model.error, model.error_at = UnavailableError("gone"), error_at
        with pytest.raises(UnavailableError):
            await whole(model, request("a", "a b c"))
        assert idle(model)
        assert (model.admission.queue.rate() is not None) == measured


async def test_a_wide_request_is_one_of_the_queue_and_is_not_refused_once_it_has_begun() -> None:
    model = HeldModel(max_queued=1)
    wide = asked(whole(model, *(request(f"w{index}") for index in range(5))))
    await until(lambda: len(model.admission.queue) == 1)
    assert model.begun == ["w0"]
    model.gate.set()
    assert len(await wide) == 10
    assert model.begun == [f"w{index}" for index in range(5)]
    assert idle(model)


async def test_of_a_wide_request_that_is_refused_nothing_begins() -> None:
    model = HeldModel(max_queued=1)
    waiting = [asked(whole(model, request(id))) for id in "ab"]
    await until(lambda: len(model.admission.queue) == 1)
    with pytest.raises(QueueFullError):
        await whole(model, *(request(f"w{index}") for index in range(5)))
    model.gate.set()
    await asyncio.gather(*waiting)
    assert model.begun == ["a", "b"]
    assert idle(model)


async def test_embeddings_have_a_place() -> None:
    model = HeldModel()
    running = asked(whole(model, request("a")))
    await until(lambda: model.begun == ["a"])
    entered = []

    async def embed(error: Exception | None = None) -> None:
        async with model.admission.place(Caller(), 10, None):
            entered.append(error)
            if error is not None:
                raise error

    embedding = asked(embed())
    await until(lambda: len(model.admission.queue) == 1)
    assert not entered
    model.gate.set()
    await asyncio.gather(running, embedding)
    with pytest.raises(InvalidRequestError):
        await embed(InvalidRequestError("too long"))
    assert idle(model)


async def test_a_replica_more_is_seen_while_nothing_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_admission, "LOOK_S", 0.01)
    model, replicas = HeldModel(), [1]
    model.admission = ModelAdmission(model.config, lambda: replicas[0])
    both = [asked(whole(model, request(id))) for id in "ab"]
    await until(lambda: len(model.admission.queue) == 1)
    replicas[0] = 2
    await until(lambda: model.begun == ["a", "b"])
    model.gate.set()
    await asyncio.gather(*both)


@pytest.mark.parametrize(
    ("max_ongoing", "running", "routers", "capacity"),
    [(4, 1, 1, 4), (4, 3, 1, 12), (4, None, 1, 4), (4, 0, 1, 4), (4, 3, 2, 6), (4, 1, 3, 2), (1, 1, 8, 1)],
)
def test_each_router_admits_its_part_of_what_the_replicas_hold(
    max_ongoing: int, running: int | None, routers: int, capacity: int
) -> None:
    config = HeldModel(max_ongoing=max_ongoing).config
    admission = ModelAdmission(config, lambda: running)
    admission.change(config, routers)
    assert admission.capacity() == capacity


async def test_new_bounds_hold_for_what_comes_next() -> None:
    model = HeldModel(max_queued=1)
    waiting = [asked(whole(model, request(id))) for id in "ab"]
    await until(lambda: len(model.admission.queue) == 1)
    model.admission.change(HeldModel(max_queued=2).config)
    waiting.append(asked(whole(model, request("c"))))
    await until(lambda: len(model.admission.queue) == 2)
    model.gate.set()
    await asyncio.gather(*waiting)
