"""A cell: the replicas of one model, the routers before them, and what starts and ends replicas.

Admission and the choice of a replica are the product's own code: `OneSequence` (`deployments/routing/sequences.py`)
with `ModelAdmission`, and the request router. Simulated are what is behind the choice (Serve's call, the engine) and
around it (Serve's controller, the start of a replica).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count

from cluster.errors import DeadlineError, QueueFullError
from cluster.model_config import ModelConfig
from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.model_admission import Caller, ModelAdmission
from deployments.routing.sequences import OneSequence
from deployments.shared_usage import TELL_S
from tests.bench.simulation.choices import Choice, ReplicaRecord
from tests.bench.simulation.engine import Engine, StepTimes
from tests.bench.simulation.engine import Sequence as EngineSequence
from tests.bench.simulation.traces import Ask

CHARACTERS_A_TOKEN = 4
# Seconds from one question to the next where the chosen replica is full; Serve's own, from the first to the last one.
BACKOFF_S, LONGEST_BACKOFF_S = 0.025, 0.5
CONTROL_S = 0.2  # how often Serve's controller decides (RAY_SERVE_CONTROL_LOOP_INTERVAL_S)


@dataclass
class Outcome:
    """One request; seconds of the simulation. `kind`: done, refused, late (its deadline passed) or left (its client).
    `tokens`: that it generated, `cached`: of its prompt, that were there."""

    ask: Ask
    came: float
    kind: str = "left"
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    cached: int = 0
    retry_after: int | None = None


@dataclass(frozen=True)
class TracedRequest(GenerationRequest):
    """`outcome` has what the simulated engine knows, and no router does: how long everything really is."""

    outcome: Outcome | None = None


class Replica:
    """`ready_at`: when it takes requests, None while it starts. `drains`: it ends with what it has."""

    def __init__(self, number: int, wanted_at: float, times: StepTimes, max_ongoing: int) -> None:
        self.record = ReplicaRecord(number, max_ongoing)
        self.engine = Engine(times)
        self.wanted_at = wanted_at
        self.ready_at: float | None = None
        self.drains = False
        self.ended_at: float | None = None


class SimulatedModel:
    """One router's view of the model: a `ServedModel` as far as a completion needs one."""

    def __init__(self, cell: Cell, choice: Choice) -> None:
        self.config = cell.config
        self._cell, self.choice = cell, choice
        self.admission = ModelAdmission(cell.config, lambda: len(cell.ready))
        self.choosing_s = 0.0  # of a real core
        self.choices = self.rejected = 0

    async def generate(self, request: TracedRequest) -> AsyncGenerator[GenerationChunk, None]:
        assert request.outcome is not None, "the cell makes it"
        ask = request.outcome.ask
        sequence = EngineSequence(ask.prompt_tokens, ask.completion_tokens, ask.conversation, ask.shared)
        replica, routed = await self._send(request, sequence)
        try:
            await sequence.first
            first = GenerationChunk("", (), None, ask.prompt_tokens, 1, cached_tokens=sequence.cached)
            self.choice.came(routed, first)
            yield first
            await sequence.done
            last = GenerationChunk(
                "", (), "stop", ask.prompt_tokens, ask.completion_tokens, cached_tokens=sequence.cached
            )
            self.choice.came(routed, last)
            yield last
        finally:
            replica.engine.leave(sequence)
            request.outcome.tokens = sequence.generated
            self.choice.ended(routed, replica.record)
            self._cell.left(replica)

    async def _send(self, request: GenerationRequest, sequence: EngineSequence) -> tuple[Replica, object]:
        """Asks as Serve does, until the chosen replica has room."""
        backoff = BACKOFF_S
        estimate = self.admission.estimate
        routed = self.choice.routed(request, estimate.of_prompt(request.prompt), estimate.of(request))
        while True:
            await self._cell.some_ready.wait()
            begun = time.process_time()
            record = await self.choice.choose(routed)
            self.choosing_s += time.process_time() - begun
            self.choices += 1
            replica = self._cell.replicas[record.number]
            if not replica.drains and replica.engine.ongoing < record.max_ongoing_requests:
                replica.engine.submit(sequence)
                self.choice.sent(routed, record, replica.engine.ongoing)
                return replica, routed
            self.rejected += 1
            self.choice.refused(routed, record, replica.engine.ongoing)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)


class Cell:
    """`choice`: makes a router's way to choose. `start_s`: seconds from the decision to start a replica, given its
    number, until it takes requests. `policy`: how many replicas from now on, given the cell and the time; None: as many
    as there are at the beginning. `sessions`: whether clients name the conversation (`x-session-id`)."""

    def __init__(
        self,
        config: ModelConfig,
        times: StepTimes,
        choice: Callable[[Cell], Choice],
        replicas: int,
        routers: int = 1,
        policy: Callable[[Cell, float], int] | None = None,
        start: Callable[[int], Awaitable[None]] | None = None,
        sessions: bool = False,
    ) -> None:
        self.config, self._times, self._policy, self._start = config, times, policy, start
        self._loop = asyncio.get_running_loop()
        self._numbers = count()
        self.replicas: dict[int, Replica] = {}
        self.ready: dict[int, ReplicaRecord] = {}
        self.some_ready = asyncio.Event()
        self.outcomes: list[Outcome] = []
        self.wanted, self.routers, self.sessions = replicas, routers, sessions
        # At, wanted, ready, running, queued.
        self.history: list[tuple[float, int, int, int, int]] = [(self._loop.time(), replicas, replicas, 0, 0)]
        self._next_router = count()
        self.models = [SimulatedModel(self, choice(self)) for _ in range(routers)]
        for _ in range(replicas):
            replica = self._new()
            replica.ready_at = self._loop.time()
            self.ready[replica.record.number] = replica.record
        self._changed()
        self._tasks = [asyncio.ensure_future(self._control())]
        if routers > 1:
            self._tasks.append(asyncio.ensure_future(self._tell()))

    async def ask(
        self, ask: Ask, timeout_s: float = 600.0, max_tokens: int | None = None, patience: float | None = None
    ) -> Outcome:
        """Through one of the routers, in turns. A client with `patience` leaves when it is over."""
        outcome = Outcome(ask, self._loop.time())
        self.outcomes.append(outcome)
        try:
            await asyncio.wait_for(self._stream(ask, timeout_s, max_tokens, outcome), patience)
            outcome.kind = "done"
        except asyncio.TimeoutError:
            pass
        except QueueFullError as error:
            outcome.kind, outcome.retry_after = "refused", error.retry_after_s
        except DeadlineError:
            outcome.kind = "late"
        outcome.ended = self._loop.time()
        return outcome

    async def _stream(self, ask: Ask, timeout_s: float, max_tokens: int | None, outcome: Outcome) -> None:
        text = f"{ask.conversation:08d}" * (ask.prompt_tokens * CHARACTERS_A_TOKEN // 8 + 1)
        request = TracedRequest(
            request_id=str(len(self.outcomes)),
            prompt=text[: ask.prompt_tokens * CHARACTERS_A_TOKEN],
            max_tokens=max_tokens,
            timeout_s=timeout_s,
            session=str(ask.conversation) if self.sessions else None,
            outcome=outcome,
        )
        model = self.models[next(self._next_router) % len(self.models)]
        async with aclosing(OneSequence(model, request, Caller(ask.client))) as sequence:
            while True:
                try:
                    chunk = (await sequence.__anext__()).chunk
                except StopAsyncIteration:
                    return
                if outcome.first is None:
                    outcome.first, outcome.cached = self._loop.time(), chunk.cached_tokens

    async def ask_all(self, asks: Sequence[Ask], timeout_s: float = 600.0) -> None:
        """Each at its time; returns when all have ended."""
        begun, asked = self._loop.time(), []
        for ask in asks:
            await asyncio.sleep(max(0.0, begun + ask.at - self._loop.time()))
            asked.append(asyncio.ensure_future(self.ask(ask, timeout_s)))
        await asyncio.gather(*asked)

    def left(self, replica: Replica) -> None:
        if replica.drains and not replica.engine.ongoing:
            replica.ended_at = self._loop.time()

    def replica_seconds(self) -> float:
        """From the decision to start each replica until its end."""
        now = self._loop.time()
        return sum(
            (now if each.ended_at is None else each.ended_at) - each.wanted_at for each in self.replicas.values()
        )

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _new(self) -> Replica:
        replica = Replica(next(self._numbers), self._loop.time(), self._times, self.config.max_ongoing)
        self.replicas[replica.record.number] = replica
        return replica

    def _take(self, replica: Replica) -> None:
        if replica.drains:
            replica.ended_at = self._loop.time()
            return
        replica.ready_at = self._loop.time()
        self.ready[replica.record.number] = replica.record
        self._changed()

    def _changed(self) -> None:
        for model in self.models:
            model.choice.update(list(self.ready.values()))
            model.admission.queue.start_waiting()
        if self.ready:
            self.some_ready.set()
        else:
            self.some_ready.clear()

    async def _starting(self, replica: Replica) -> None:
        assert self._start is not None
        await self._start(replica.record.number)
        self._take(replica)

    def _scale(self, wanted: int) -> None:
        self.wanted = wanted
        there = [each for each in self.replicas.values() if not each.drains]
        for _ in range(wanted - len(there)):
            self._tasks.append(asyncio.ensure_future(self._starting(self._new())))
        # Serve ends those that are not ready first, then the newest.
        for replica in sorted(there, key=lambda each: (each.ready_at is None, each.record.number))[wanted:]:
            replica.drains = True
            if self.ready.pop(replica.record.number, None) is not None:
                self.left(replica)
        self._changed()

    async def _control(self) -> None:
        while True:
            await asyncio.sleep(CONTROL_S)
            now = self._loop.time()
            if self._policy is not None:
                wanted = self._policy(self, now)
                if wanted != self.wanted:
                    self._scale(wanted)
            running = sum(model.admission.queue.running for model in self.models)
            queued = sum(len(model.admission.queue) for model in self.models)
            self.history.append((now, self.wanted, len(self.ready), running, queued))

    async def _tell(self) -> None:
        """What the routers hear of each other (`deployments/shared_usage.py`)."""
        while True:
            await asyncio.sleep(TELL_S)
            running = [model.admission.queue.running for model in self.models]
            for model, own in zip(self.models, running, strict=True):
                model.admission.elsewhere(sum(running) - own)
