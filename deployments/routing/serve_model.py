"""A served model behind a Ray Serve deployment handle: where the router's requests cross to a replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import grpc
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.config import LimitsConfig
from cluster.errors import EngineError, QueueFullError, UnavailableError
from cluster.model_config import ModelConfig
from cluster.ray_errors import nibble_cause
from deployments.observability.tracing import traced
from deployments.records import Conversation, GenerationChunk, GenerationRequest
from deployments.routing.greeting import Traffic
from deployments.routing.model_admission import ModelAdmission
from deployments.routing.prefix import BLOCK_IDS, MAX_BLOCKS, Prefix, ReplicaCosts, Routed, prefix_of
from deployments.routing.request_router import RoutedRequest, replica_stats, running_replicas
from deployments.routing.watch import MovedError, Watch

# Seconds before a request whose replica died goes to another one, once more each. A model whose only replica died has
# left Serve's list by the second time, and its requests then wait for the next replica. No more: a request that kills
# its replica must not kill all.
RETRIES_S = (0.2, 3.0)


class ServeModel:
    """A `ServedModel` of the router. A request that has no answer yet is tried again where its replica dies, and goes
    along where the model moves to another application. `traffic` counts the requests for which a replica computes."""

    def __init__(self, config: ModelConfig, traffic: Traffic) -> None:
        self.config = config
        self._traffic = traffic
        self._limits = LimitsConfig()
        self._awaited = False
        self._app: str | None = None
        self._handle: Any = None
        self._stream: Any = None
        self._watches: set[Watch] = set()  # of requests in flight
        self._failed = False  # whether its deployment fails to start, as the last request found that waited for it
        self._only_router = True
        self.admission = ModelAdmission(config, self._running)

    def change(self, config: ModelConfig, app: str, limits: LimitsConfig, awaited: bool, routers: int = 1) -> None:
        """To a new configuration, served by `app`, and by so many routers."""
        self.config, self._limits, self._awaited = config, limits, awaited
        self.admission.change(config, routers)
        self._only_router = routers == 1
        if app != self._app:
            self.use(serve.get_deployment_handle(config.deployment, app, _check_exists=False))
            self._app = app

    def use(self, handle: DeploymentHandle) -> None:
        """What has not begun goes to the new handle; what has begun ends where it is, within the time to drain."""
        self._handle, self._failed = handle, False
        self._stream = handle.options(method_name="generate", stream=True)
        self._costs = costs_of(self.config)
        begun = [watch for watch in self._watches if watch.begun]
        for watch in list(self._watches):
            watch.move()
        self._end_later(begun, "it has moved to new replicas")

    def leave(self) -> None:
        """The model was removed: what is in flight or waits ends where it is, within the time to drain."""
        error = self._end_later(list(self._watches), "it was removed")
        asyncio.get_running_loop().call_later(self._limits.drain, self.admission.queue.end, error)

    def _end_later(self, watches: Sequence[Watch], why: str) -> UnavailableError:
        """Before Serve ends the replicas, and these requests with a worse reason, which is returned."""
        drain, name = self._limits.drain, self.config.name
        error = UnavailableError(
            f"model {name}: {why}, and the {drain:g} s for requests in flight to end (limits.drain_s) are over"
        )

        def end() -> None:
            for watch in self._watches.intersection(watches):
                watch.end(error)

        if watches:
            asyncio.get_running_loop().call_later(drain, end)
        return error

    def waiting(self) -> int:
        """How many requests have not begun."""
        return len(self.admission.queue) + sum(not watch.begun for watch in self._watches)

    def ready(self) -> bool:
        if self._running():
            self._failed = False
            return True
        return self.config.replicas.min == 0 and not self._failed  # a request starts one

    @property
    def awaited(self) -> bool:
        return self._awaited or self._running() is None

    def _running(self) -> int | None:
        return running_replicas(self._handle.deployment_id)

    async def replica_stats(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """What its running replicas say of themselves, by their ids; without those that do not answer in time."""
        return await replica_stats(self._handle.deployment_id, timeout_s)

    def end(self, error: Exception) -> None:
        self.admission.queue.end(error)
        for watch in list(self._watches):
            watch.end(error)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        with (
            traced(request, "call replica", "CLIENT") as request,
            self._traffic.request(),
            self._watched(request.timeout_s) as watch,
        ):
            tries, prefix = Tries(self.config.name), prefix_of(request)
            while True:
                costs, routed = self._costs, self._routed(request, prefix)
                try:
                    asked = RoutedRequest(request, routed, costs, self._only_router)
                    response = watch.start(self._stream.remote(asked))
                    async for chunk in response:
                        watch.progress()
                        costs.came(routed, chunk)
                        yield chunk
                    watch.finished()
                    return
                except BaseException as error:  # noqa: BLE001 - `again` raises it, unless it is one to try again after
                    await tries.again(watch.meaning(error), watch)
                finally:
                    watch.stop()
                    costs.end(routed)

    def _routed(self, request: GenerationRequest, prefix: Prefix) -> Routed:
        estimate = self.admission.estimate
        prompt_tokens = estimate.of_prompt(request.prompt)
        return Routed(prefix, request.session, prompt_tokens, estimate.of(request) - prompt_tokens)

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool, timeout_s: float | None) -> list[int]:
        return list(await self._ask("tokenize", timeout_s, text, add_special_tokens))

    async def tokenizer_info(self, timeout_s: float | None) -> dict[str, Any]:
        return dict(await self._ask("tokenizer_info", timeout_s))

    async def detokenize(self, ids: Sequence[int], timeout_s: float | None) -> str:
        return str(await self._ask("detokenize", timeout_s, ids))

    async def embed(
        self, prompt: str | tuple[int, ...], max_tokens: int | None, timeout_s: float | None
    ) -> tuple[list[float], int]:
        with self._traffic.request():
            vector, tokens = await self._ask("embed", timeout_s, prompt, max_tokens)
        return vector, tokens

    async def _ask(self, method: str, timeout_s: float | None, *arguments: Any) -> Any:
        with self._watched(timeout_s) as watch:
            tries = Tries(self.config.name)
            while True:
                try:
                    answer = await watch.start(self._handle.options(method_name=method).remote(*arguments))
                    watch.finished()
                    return answer
                except BaseException as error:  # noqa: BLE001 - `again` raises it, unless it is one to try again after
                    await tries.again(watch.meaning(error), watch)
                finally:
                    watch.stop()

    @contextlib.contextmanager
    def _watched(self, timeout_s: float | None) -> Iterator[Watch]:
        name = self.config.name
        with self.admission.use(), Watch(f"model {name}", timeout_s, self._limits.stall_s) as watch:
            self._watches.add(watch)
            try:
                yield watch
            except BackPressureError:
                # Admission holds back what the replicas cannot take: this many wait where they have just become fewer.
                queued, retry = self.config.queue.max_queued, self.admission.queue.retry_after_s(None)
                raise QueueFullError(
                    f"model {name}: {queued} requests wait already (queue.max_queued); try again in {retry} s", retry
                ) from None
            except DeploymentUnavailableError:
                self._failed = True
                raise UnavailableError(f"model {name}: its deployment failed to start") from None
            except RayTaskError as error:
                cause = nibble_cause(error)
                if cause is None:
                    raise
                raise cause from None
            finally:
                self._watches.discard(watch)


def costs_of(config: ModelConfig) -> ReplicaCosts:
    """Of new replicas. Engine bigdl keeps the last prompt, engine openvino the blocks of many; by default it has room
    for as many as it runs at once."""
    if config.engine == "bigdl":
        return ReplicaCosts(config.context, single=True)
    sized = config.openvino is not None and config.openvino.kv_cache is not None
    return ReplicaCosts(MAX_BLOCKS * BLOCK_IDS if sized else config.context * config.max_ongoing)


def cause_of(error: BaseException) -> BaseException | None:
    """What the replica raised; Serve raises it as it is, or in a RayTaskError, as the way goes that it came."""
    return nibble_cause(error) if isinstance(error, RayTaskError) else error


# What Ray 2.60 raises, as a plain RuntimeError, where a replica dies before it has accepted the request
# (`get_rejection_response` of serve/_private/replica_result.py).
NOT_ACCEPTED = "Unexpected error (StatusCode.UNAVAILABLE)"


class Tries:
    """How often one request has been tried."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._waits = iter(RETRIES_S)

    async def again(self, error: BaseException, watch: Watch) -> None:
        """Returns where the request is to be tried again, after a while. Raises the error otherwise, as nibble's where
        a replica died."""
        if isinstance(error, MovedError):
            return
        # An engine that has ended is as good as a replica that has died: Serve will replace it.
        died = isinstance(error, (RayActorError, grpc.aio.AioRpcError)) or isinstance(cause_of(error), EngineError)
        if not died and not (isinstance(error, RuntimeError) and str(error).startswith(NOT_ACCEPTED)):
            raise error
        wait = None if watch.begun else next(self._waits, None)
        if wait is None:
            when = "during the request" if watch.begun else "before the first token, and so did the next ones"
            raise UnavailableError(f"model {self._model}: its replica died {when}") from None
        await watch.sleep(wait)
