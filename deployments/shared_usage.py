"""What the routers tell each other, through one small actor: the API keys' use, and the models' load, which the
autoscaling policy hears there, too.

Each router counts alone (`deployments/api/access.py`, `deployments/routing/admission.py`) and tells what its own
requests hold and have spent, twice a second; what the others told is counted in from then on. So a limit that is shared
is right within a second, and where the actor or another router is gone each goes on with what it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from cluster.serve_settings import NAMESPACE, SERVE_LOGGER
from deployments.api.access import Access, Uses
from deployments.load_board import ACTOR_NAME
from deployments.routing.model_admission import ModelAdmission
from deployments.scaling import ModelLoad, of_all

logger = logging.getLogger(SERVE_LOGGER)

TELL_S = 0.5
SILENT_S = 5.0  # a router that told nothing for so long has ended, and its requests with it


class RouterUse(NamedTuple):
    """Of one router's requests. `loads`: of each model, by its name."""

    keys: Uses
    loads: dict[str, ModelLoad]


Admissions = Mapping[str, ModelAdmission]  # by the model's name


def use_of(access: Access, admissions: Admissions) -> RouterUse:
    return RouterUse(access.uses(), {name: each.load() for name, each in admissions.items()})


def take(access: Access, admissions: Admissions, told: Mapping[str, RouterUse] | None) -> None:
    """Counts in what the other routers told; None: they cannot be heard."""
    access.others({router: use.keys for router, use in (told or {}).items()})
    for name, admission in admissions.items():
        running = (use.loads.get(name, ModelLoad()).running for use in (told or {}).values())
        admission.elsewhere(None if told is None else sum(running))


class UsageBoard:
    """Runs as a detached Ray actor. It keeps nothing that the routers would not tell it again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[float, RouterUse]] = {}  # by router

    def tell(self, router: str, use: RouterUse) -> dict[str, RouterUse]:
        """Takes what a router's own requests use, and returns the same of each other router that is alive."""
        self._told[router] = self._clock(), use
        return {name: use for name, use in self._alive().items() if name != router}

    def loads(self) -> dict[str, ModelLoad]:
        """Of each model, at all routers that are alive."""
        alive = self._alive().values()
        models = {model for use in alive for model in use.loads}
        return {model: of_all(use.loads[model] for use in alive if model in use.loads) for model in models}

    def _alive(self) -> dict[str, RouterUse]:
        now = self._clock()
        self._told = {name: told for name, told in self._told.items() if now - told[0] < SILENT_S}
        return {name: use for name, (_, use) in self._told.items()}


class SharedUsage:
    """One router's side. `access` returns the keys in force, `admissions` the models', which a change of the
    configuration replaces."""

    def __init__(self, access: Callable[[], Access], admissions: Callable[[], Admissions]) -> None:
        self._access, self._admissions = access, admissions
        self._name = uuid.uuid4().hex
        self._running: asyncio.Task[None] | None = None
        self._urgent = asyncio.Event()

    def tell_now(self) -> None:
        """Not only in half a second."""
        self._urgent.set()

    def share(self, wanted: bool) -> None:
        """Starts or stops telling the others, and Serve's controller (`load_board.py`)."""
        if wanted and self._running is None:
            self._running = asyncio.ensure_future(self._tell())
        elif not wanted and self._running is not None:
            self._running.cancel()
            self._running = None
            take(self._access(), self._admissions(), None)

    async def _tell(self) -> None:
        board, silent = None, False
        while True:
            try:
                board = board or board_handle()
                self._urgent.clear()
                access, admissions = self._access(), self._admissions()
                own = use_of(access, admissions)
                take(access, admissions, await asyncio.wait_for(board.tell.remote(self._name, own), SILENT_S))
                silent = False
            except (RayError, TimeoutError, asyncio.TimeoutError, ValueError) as error:
                board = None  # it may have to be made again
                if not silent:
                    logger.warning("limits of API keys and replicas are counted by each router alone: %s", error)
                silent = True
                take(self._access(), self._admissions(), None)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), TELL_S)


def board_handle() -> ray.actor.ActorHandle[UsageBoard]:
    actor = ray.remote(UsageBoard).options(
        name=ACTOR_NAME, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1
    )
    return actor.remote()
