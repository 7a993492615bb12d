"""The load of all models, as Serve's controller hears it from the actor that the routers tell
(`deployments/shared_usage.py`). A module of its own, so that the controller loads nothing of the router's."""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.serve_settings import NAMESPACE, SERVE_LOGGER
from deployments.scaling import ModelLoad

logger = logging.getLogger(SERVE_LOGGER)

ACTOR_NAME = "router-usage"
# Seconds between two questions; Serve decides five times a second (RAY_SERVE_CONTROL_LOOP_INTERVAL_S).
ASK_S = 0.25
ANSWER_S = 5.0
MISSING_S = 2.0  # before the actor is looked for again


class LoadBoard:
    """`loads`: of all models, by their names, at all routers; None while it is not known. A task on the event loop of
    the process keeps it fresh: nobody who reads it waits."""

    def __init__(self) -> None:
        self.loads: dict[str, ModelLoad] | None = None
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Starts the task, once. To be called on the event loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        board: Any = None
        while True:
            try:
                board = board or await asyncio.to_thread(ray.get_actor, ACTOR_NAME, NAMESPACE)
                self.loads = await asyncio.wait_for(board.loads.remote(), ANSWER_S) or None
                await asyncio.sleep(ASK_S)
            except (RayError, TimeoutError, asyncio.TimeoutError, ValueError) as error:
                if self.loads is not None:
                    logger.warning("the models' load is not known; their replicas stay as they are: %s", error)
                board = self.loads = None
                await asyncio.sleep(MISSING_S)


@cache
def load_board() -> LoadBoard:
    """The one of this process."""
    return LoadBoard()
