"""A served model behind a Ray Serve deployment handle: where the router's requests cross to a replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.config import ModelConfig
from cluster.errors import DeadlineError, QueueFullError, UnavailableError
from cluster.ray_errors import nibble_cause
from deployments.records import Conversation, GenerationChunk, GenerationRequest
from deployments.routing.greeting import Traffic

logger = logging.getLogger("ray.serve")

# Seconds from one look at Serve's status to the next: while a model has no replica, or one died a moment ago, and while
# all is well. Ray 2.60 pickles each deployment's request router anew for it, 10 to 60 ms of Python that the router's
# requests wait for.
UNSETTLED_POLL_S = 1.0
SETTLED_POLL_S = 10.0


class ServeModel:
    """A `ServedModel` of the router. `lost_replica` is set when a request finds that its replica died; `traffic` counts
    the requests for which a replica computes."""

    def __init__(
        self, config: ModelConfig, handle: DeploymentHandle, lost_replica: asyncio.Event, traffic: Traffic
    ) -> None:
        self.config = config
        self._traffic = traffic
        self.running_replicas = 0
        self._lost_replica = lost_replica
        self._handle = handle
        self._stream = handle.options(method_name="generate", stream=True)

    def ready(self) -> bool:
        return self.running_replicas > 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        response = self._stream.remote(request)
        finished = expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            response.cancel()

        timer = None
        if request.timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(request.timeout_s, expire)
        try:
            with self._traffic.request(), self._replica_errors():
                async for chunk in response:
                    finished = chunk.finish_reason is not None
                    yield chunk
        except TaskCancelledError:  # RequestCancelledError is one
            if not expired:
                raise
            raise DeadlineError(f"the request took longer than the {request.timeout_s:g} s it was allowed") from None
        finally:
            if timer is not None:
                timer.cancel()
            if not finished:
                response.cancel()

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool) -> list[int]:
        return list(await self._ask("tokenize", text, add_special_tokens))

    async def detokenize(self, ids: Sequence[int]) -> str:
        return str(await self._ask("detokenize", ids))

    async def embed(self, prompt: str | tuple[int, ...], max_tokens: int | None) -> tuple[list[float], int]:
        with self._traffic.request():
            vector, tokens = await self._ask("embed", prompt, max_tokens)
        return vector, tokens

    async def _ask(self, method: str, *arguments: Any) -> Any:
        response = self._handle.options(method_name=method).remote(*arguments)
        with self._replica_errors():
            return await response

    @contextlib.contextmanager
    def _replica_errors(self) -> Iterator[None]:
        """Ray's errors as nibble's."""
        name = self.config.name
        try:
            yield
        except BackPressureError:
            queue = self.config.queue
            raise QueueFullError(
                f"model {name}: {queue.max_queued} requests wait already (queue.max_queued); come again"
            ) from None
        except DeploymentUnavailableError:
            raise UnavailableError(f"model {name}: its deployment failed to start") from None
        except RayTaskError as error:
            cause = nibble_cause(error)
            if cause is None:
                raise
            raise cause from None
        except RayActorError:
            self._lost_replica.set()
            raise UnavailableError(f"model {name}: its replica died during the request") from None


async def watch_readiness(app_name: str, models: Sequence[ServeModel], lost_replica: asyncio.Event) -> None:
    """Keeps each model's count of running replicas current, until cancelled."""
    lost_at = float("-inf")
    while True:
        # A poll that fails (the controller restarts, say) changes nothing; the next one tells.
        with contextlib.suppress(Exception):
            status = await asyncio.to_thread(serve.status)
            deployments = status.applications[app_name].deployments
            for model in models:
                model.running_replicas = deployments[model.config.name].replica_states.get("RUNNING", 0)
        if time.monotonic() - lost_at < SETTLED_POLL_S or not all(model.ready() for model in models):
            await asyncio.sleep(UNSETTLED_POLL_S)
        else:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lost_replica.wait(), SETTLED_POLL_S)
        if lost_replica.is_set():
            lost_replica.clear()
            lost_at = time.monotonic()
