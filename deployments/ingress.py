"""The router as Serve runs it: the three APIs over one router. Several of them may run beside each other.

A module of its own, so that the router's process loads no engine, no tokenizer and no grammar library.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve

from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.grpc.grpc_api import GrpcApi
from deployments.api.http.http10 import end_with_the_connection
from deployments.api.http.http_api import build_http_api
from deployments.api.kserve.kserve_api import KserveApi
from deployments.api.operations import Operations
from deployments.observability.metrics import RouterMetrics
from deployments.router_settings import RouterSettings
from deployments.routing.greeting import FirstAnswer, Traffic, first_answer
from deployments.routing.request_router import use_cost_router
from deployments.routing.router import Router
from deployments.routing.serve_model import ServeModel
from deployments.scraping import Elsewhere
from deployments.shared_usage import SharedUsage

# Seconds. `nibble status` waits for longer.
REPLICA_ANSWER_S = 10.0


def http_api() -> FastAPI:
    """Called by Serve inside the router's replica; the ingress exists when the first request asks for it."""

    def ingress() -> Ingress:
        return serve.get_replica_context().servable_object  # type: ignore[no-any-return]

    return build_http_api(lambda: ingress().operations)


@serve.ingress(http_api)
class Ingress(GrpcApi, KserveApi):
    """Serve calls `reconfigure` with the settings before the first request, and again at every change."""

    def __init__(self) -> None:
        use_cost_router()
        end_with_the_connection()
        self._settings: RouterSettings | None = None
        self._traffic = Traffic()
        self._models: dict[str, ServeModel] = {}
        self._removed: list[ServeModel] = []  # whose requests may be in flight
        self._ending: asyncio.Task[None] | None = None
        self._shared_usage = SharedUsage(
            lambda: self.operations.calls.access,
            lambda: {name: model.admission for name, model in self._models.items()},
        )
        self._metrics = RouterMetrics(serve.get_replica_context().replica_id.unique_id)
        self._elsewhere = Elsewhere(self._metrics.router)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Requests in flight go on; what has not begun goes to where its model runs now."""
        settings = RouterSettings.model_validate(user_config)
        config, before = settings.config, self._settings
        models = {}
        for model in config.models:
            served = self._models.get(model.name) or ServeModel(model, self._traffic)
            served.admission.wake = self._shared_usage.tell_now
            awaited, routers = model.name in settings.awaited, config.router.replicas
            served.change(model, settings.apps[model.name], config.limits, awaited, routers)
            models[model.name] = served
        if before is None or before.config.auth != config.auth:
            access = Access(config.auth)
        else:
            access = self.operations.calls.access
        calls = Calls(access, config.logging, metrics=self._metrics, traces=config.observability.traces)
        if before is None:
            self.operations = Operations(Router(models, config.limits), calls, config.http.cors_origins)
            self.operations.metrics_elsewhere = self._metrics_elsewhere
        else:
            self.operations.router.change(models, config.limits)
            self.operations.calls, self.operations.cors_origins = calls, config.http.cors_origins
        removed = [model for name, model in self._models.items() if name not in models]
        for gone in removed:
            gone.leave()
        self._removed = [model for model in self._removed if model.waiting()] + removed
        self._models, self._settings = models, settings
        self._shared_usage.share(config.router.replicas > 1 or any(model.replicas.scales for model in config.models))
        if settings.draining and self._ending is None:
            self._ending = asyncio.ensure_future(self.operations.drain(config.limits.drain))
        elif not settings.draining and self._ending is not None:
            self._ending.cancel()
            self._ending = None
            self.operations.router.draining = False

    async def settings(self) -> RouterSettings | None:
        """For `nibble status` and `nibble apply`."""
        return self._settings

    async def router_metrics(self) -> list[Metric]:
        """For the router that is scraped: of this one alone."""
        return self.operations.router_metrics()

    async def _metrics_elsewhere(self) -> list[Metric]:
        assert self._settings is not None
        return await self._elsewhere.metrics(self._settings.config.router.replicas > 1, self._models)

    async def removed_waiting(self) -> int:
        """How many requests of models that were removed have not begun: they need the replicas. For `nibble apply`."""
        return sum(model.waiting() for model in self._removed)

    async def replica_info(self, model: str) -> dict[str, Any]:
        """For `nibble status`: what one of its replicas says of itself, a full one too; empty where none does."""
        stats = await self._models[model].replica_stats(REPLICA_ANSWER_S)
        return next(iter(stats.values()), {})

    async def first_answer(self, model: str, prompt: str, max_tokens: int) -> FirstAnswer:
        """For `nibble serve`."""
        return await first_answer(self.operations.router.model(model), self._traffic, prompt, max_tokens)
