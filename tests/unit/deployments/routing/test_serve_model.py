"""What becomes of a request whose replica is slow, frozen or dead, or whose model moves."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve._private import replica_result
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from cluster.config import LimitsConfig
from cluster.errors import DeadlineError, EngineError, QueueFullError, UnavailableError
from cluster.model_config import ModelConfig, ReplicasConfig
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing import serve_model
from deployments.routing.greeting import Traffic
from deployments.routing.model_admission import Caller, ModelAdmission
from deployments.routing.request_router import RoutedRequest
from deployments.routing.serve_model import ServeModel

CONFIG = ModelConfig(name="m", family="llama", checkpoint="builtin:llama")
REQUEST = GenerationRequest(request_id="r", prompt="a", max_tokens=1)
Step = GenerationChunk | str | Exception | asyncio.Event | None


def chunk(index: int, last: bool = False) -> GenerationChunk:
    return GenerationChunk(f"{index} ", (index,), "stop" if last else None, 1, index + 1)


class Response:
    """Gives the steps in order: a chunk, an error, an event, which it waits for, or None, which waits until it is
    cancelled."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.cancelled = asyncio.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if step is None:
            await self.cancelled.wait()
            raise RequestCancelledError
        if isinstance(step, Exception):
            raise step
        if isinstance(step, asyncio.Event):
            await step.wait()
            return await self.__anext__()
        return step


class Handle:
    """Of a deployment, whose responses go so."""

    def __init__(self, *tries: list[Step]) -> None:
        self.tries = [Response(steps) for steps in tries]
        self.asked: list[Response] = []
        self.arguments: list[Any] = []

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Response:
        self.arguments += arguments
        for asked in arguments:
            if isinstance(asked, RoutedRequest):  # as the request router does
                asked.costs.keep("a")
                asked.costs.choose(asked.routed, {"a": 0})
        self.asked.append(self.tries.pop(0))
        return self.asked[-1]


def served(handle: Handle, **limits: Any) -> ServeModel:
    model = ServeModel(CONFIG, Traffic())
    model.use(handle)  # type: ignore[arg-type]
    model._limits = LimitsConfig(**limits)
    return model


async def texts(model: ServeModel, request: GenerationRequest = REQUEST) -> list[str]:
    return [chunk.text async for chunk in model.generate(request)]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_model, "RETRIES_S", (0.0, 0.0))


def died() -> RayActorError:
    return ActorUnavailableError("gone", None)


@pytest.mark.usefixtures("at_once")
async def test_a_request_that_has_not_begun_is_tried_elsewhere() -> None:
    handle = Handle([died()], [chunk(0), chunk(1, last=True)])
    assert await texts(served(handle)) == ["0 ", "1 "]
    handle = Handle([died()], [died()], ["the text"])
    assert await served(handle).detokenize([1], None) == "the text"


@pytest.mark.usefixtures("at_once")
async def test_each_try_is_routed_anew_and_its_end_is_noted() -> None:
    handle = Handle([died()], [chunk(0), chunk(1, last=True)], [None])
    model = served(handle)
    request = replace(REQUEST, session="s")
    assert len(await texts(model, request)) == 2
    reading = asyncio.ensure_future(texts(model, request))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    routed = [asked.routed for asked in handle.arguments]
    assert [(each.session, each.generated) for each in routed] == [("s", 0), ("s", 2), ("s", 0)]
    assert len(set(routed)) == 3
    assert [asked.request for asked in handle.arguments] == [request] * 3
    assert all(each.replica is None for each in routed)
    assert model._costs.completions("a") == 0


@pytest.mark.usefixtures("at_once")
async def test_no_more_than_three_replicas_die_of_one_request() -> None:
    handle = Handle([died()], [died()], [died()], [chunk(0, last=True)])
    with pytest.raises(UnavailableError, match="died before the first token, and so did the next ones"):
        await texts(served(handle))
    assert len(handle.tries) == 1


@pytest.mark.usefixtures("at_once")
async def test_a_request_that_has_begun_ends_with_its_replica() -> None:
    handle = Handle([chunk(0), died()], [chunk(0, last=True)])
    with pytest.raises(UnavailableError, match="died during the request"):
        await texts(served(handle))
    assert len(handle.tries) == 1


@pytest.mark.usefixtures("at_once")
async def test_a_replica_whose_engine_has_ended_is_as_good_as_dead() -> None:
    handle = Handle([EngineError("the engine has ended")], [chunk(0, last=True)])
    assert await texts(served(handle)) == ["0 "]
    with pytest.raises(UnavailableError, match="died during the request"):
        await texts(served(Handle([chunk(0), EngineError("the engine has ended")])))


@pytest.mark.usefixtures("at_once")
async def test_a_replica_that_dies_before_it_has_accepted_the_request() -> None:
    """Ray's fault, seen in the source of 2.60: a replica that died is told as a plain RuntimeError."""
    assert 'raise RuntimeError(f"Unexpected error ({code}): {details}.")' in inspect.getsource(replica_result)
    error = RuntimeError(f"Unexpected error ({grpc.StatusCode.UNAVAILABLE}): Socket closed.")
    assert await texts(served(Handle([error], [chunk(0, last=True)]))) == ["0 "]


async def test_an_error_of_the_replica_itself_is_not_tried_again() -> None:
    handle = Handle([ValueError("wrong")], [chunk(0, last=True)])
    with pytest.raises(ValueError, match="wrong"):
        await texts(served(handle))
    assert len(handle.tries) == 1


async def test_a_replica_that_stops_in_the_middle_counts_as_frozen() -> None:
    handle = Handle([chunk(0), None])
    with pytest.raises(UnavailableError, match=r"gave no token for 0\.05 s \(limits\.stall_s\)"):
        await texts(served(handle, stall_s=0.05))
    assert handle.asked[0].cancelled.is_set()


async def test_a_router_that_stood_still_takes_no_replica_for_frozen() -> None:
    more, loop = asyncio.Event(), asyncio.get_running_loop()
    stream = served(Handle([chunk(0), more, chunk(1, last=True)]), stall_s=0.05).generate(REQUEST)
    assert (await anext(stream)).text == "0 "
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    loop.call_soon(loop.call_soon, more.set)  # as a token that takes some turns from the socket to its reader
    time.sleep(0.2)
    assert (await reading).text == "1 "


async def test_before_the_first_token_nothing_stalls() -> None:
    handle = Handle([None])
    waiting = asyncio.ensure_future(texts(served(handle, stall_s=0.01)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert handle.asked[0].cancelled.is_set()


async def test_what_has_not_begun_moves_along_with_its_model() -> None:
    old, new = Handle([None], [chunk(0), None]), Handle([chunk(7, last=True)])
    model = served(old)
    waiting = asyncio.ensure_future(texts(model))
    stream = model.generate(REQUEST)
    await until(lambda: len(old.asked) == 1)
    assert (await anext(stream)).text == "0 "
    model.use(new)  # type: ignore[arg-type]
    assert await waiting == ["7 "]
    assert old.asked[0].cancelled.is_set()
    assert not old.asked[1].cancelled.is_set(), "what has begun ends where it is"
    await stream.aclose()


async def test_of_a_removed_model_requests_end_whole_within_the_drain() -> None:
    free = asyncio.Event()
    model = served(Handle([chunk(0), chunk(1, last=True)], [free, chunk(7, last=True)]), drain_s=60)
    stream = model.generate(REQUEST)
    assert (await anext(stream)).text == "0 "
    waiting = model.generate(REQUEST)
    turn = asyncio.ensure_future(anext(waiting))
    await until(lambda: model.waiting() == 1)
    model.leave()
    free.set()
    assert (await anext(stream)).text == "1 "
    assert (await turn).text == "7 "
    assert model.waiting() == 0
    assert [each async for each in stream] == [each async for each in waiting] == []


async def test_where_the_drain_ends_first_the_requests_of_a_removed_model_are_told() -> None:
    handle = Handle([chunk(0), None], [None])
    model = served(handle, drain_s=0.05)
    stream = model.generate(REQUEST)
    assert (await anext(stream)).text == "0 "
    waiting = asyncio.ensure_future(texts(model))
    await until(lambda: len(handle.asked) == 2)
    model.leave()
    for ended in (anext(stream), waiting):
        with pytest.raises(UnavailableError, match=r"^model m: it was removed, and the 0\.05 s .*\(limits\.drain_s\)"):
            await ended
    assert all(response.cancelled.is_set() for response in handle.asked)


async def test_what_waits_for_a_place_counts_and_is_told_when_its_server_or_model_ends() -> None:
    for end in (lambda model: model.end(UnavailableError("it was removed")), lambda model: model.leave()):
        model = served(Handle(), drain_s=0.01)
        model.admission = ModelAdmission(
            ModelConfig.model_validate({**CONFIG.model_dump(), "queue": {"max_ongoing": 1}}), lambda: 1
        )
        running = await model.admission.admit(Caller(), 1, None)
        waiting = asyncio.ensure_future(model.admission.admit(Caller(), 1, None))
        await until(lambda model=model: model.waiting() == 1)
        end(model)
        with pytest.raises(UnavailableError, match="it was removed"):
            await waiting
        model.admission.queue.leave(running)
        assert model.waiting() == 0


async def test_serves_own_full_queue_is_refused_with_the_seconds() -> None:
    with pytest.raises(QueueFullError, match="try again in 1 s"):
        await texts(served(Handle([BackPressureError(num_queued_requests=64, max_queued_requests=64)])))


async def test_where_the_drain_ends_first_what_had_begun_before_a_move_is_told() -> None:
    old, new = Handle([chunk(0), None]), Handle([chunk(1), None])
    model = served(old, drain_s=0.05)
    stream = model.generate(REQUEST)
    assert (await anext(stream)).text == "0 "
    model.use(new)  # type: ignore[arg-type]
    later = model.generate(REQUEST)
    assert (await anext(later)).text == "1 "
    with pytest.raises(UnavailableError, match=r"it has moved to new replicas, and the 0\.05 s"):
        await anext(stream)
    assert not new.asked[0].cancelled.is_set(), "it began after the move"
    await later.aclose()


async def test_when_the_server_ends_its_streams_are_told() -> None:
    model = served(Handle([chunk(0), None], [None]))
    stream = model.generate(REQUEST)
    assert (await anext(stream)).text == "0 "
    waiting = asyncio.ensure_future(model.embed("a", None, None))
    await asyncio.sleep(0)
    model.end(UnavailableError("shutting down"))
    with pytest.raises(UnavailableError, match="shutting down"):
        await anext(stream)
    with pytest.raises(UnavailableError, match="shutting down"):
        await waiting


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(holds(), 30)


@pytest.mark.parametrize("operation", ["generate", "tokenize", "detokenize", "embed"])
async def test_what_takes_longer_than_its_time_ends_with_a_deadline(operation: str) -> None:
    handle = Handle([None])
    model = served(handle)
    request = GenerationRequest(request_id="r", prompt="a", max_tokens=1, timeout_s=0.01)
    awaited = {
        "generate": lambda: anext(model.generate(request)),
        "tokenize": lambda: model.tokenize("a", True, 0.01),
        "detokenize": lambda: model.detokenize([1], 0.01),
        "embed": lambda: model.embed("a", None, 0.01),
    }
    with pytest.raises(DeadlineError, match=r"longer than the 0\.01 s"):
        await awaited[operation]()
    assert handle.asked[0].cancelled.is_set()


async def test_a_wait_for_the_next_try_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_model, "RETRIES_S", (100.0,))
    request = GenerationRequest(request_id="r", prompt="a", max_tokens=1, timeout_s=0.05)
    with pytest.raises(DeadlineError):
        await texts(served(Handle([died()])), request)


async def test_a_caller_that_leaves_stops_the_replica() -> None:
    handle = Handle([None])
    asked = asyncio.ensure_future(served(handle).embed("a", None, 60))
    await asyncio.sleep(0)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    assert handle.asked[0].cancelled.is_set()


@pytest.mark.parametrize(("least", "running", "ready"), [(0, 0, True), (0, 1, True), (1, 0, False), (1, 1, True)])
async def test_a_model_that_a_request_starts_is_ready_without_a_replica(
    monkeypatch: pytest.MonkeyPatch, least: int, running: int, ready: bool
) -> None:
    monkeypatch.setattr(ServeModel, "_running", lambda model: running)
    model = served(Handle())
    model.config = CONFIG.model_copy(update={"replicas": ReplicasConfig(min=least)})
    assert model.ready() is ready


async def test_a_model_whose_start_failed_is_not_ready_until_it_has_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    running = 0
    monkeypatch.setattr(ServeModel, "_running", lambda model: running)
    model = served(Handle([DeploymentUnavailableError(DeploymentID("m", "m"))], [chunk(0, last=True)]))
    model.config = CONFIG.model_copy(update={"replicas": ReplicasConfig(min=0)})
    with pytest.raises(UnavailableError, match="failed to start"):
        await texts(model)
    assert not model.ready()
    running = 1
    assert model.ready()
    running = 0
    assert model.ready()


async def test_what_is_sent_to_a_replica_counts_as_use() -> None:
    gate = asyncio.Event()
    model = served(Handle([gate, [1, 2]]))  # type: ignore[list-item]
    asking = asyncio.ensure_future(model.tokenize("a", True, None))
    await asyncio.sleep(0)
    assert model.admission.load().idle_s == 0
    gate.set()
    assert await asking == [1, 2]
    assert model.admission.load().idle_s > 0
