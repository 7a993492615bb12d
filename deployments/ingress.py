"""The router as Serve runs it: the three APIs over one router, and what watches the models behind it.

A module of its own, so that the router's process loads no engine, no tokenizer and no grammar library.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import ModelConfig, NibbleConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.grpc_api import GrpcApi
from deployments.api.http_api import build_http_api
from deployments.api.kserve_api import KserveApi
from deployments.routing.greeting import FirstAnswer, Traffic, first_answer
from deployments.routing.router import Router
from deployments.routing.serve_model import ServeModel, watch_readiness

APP_NAME = "nibble"


def http_api() -> FastAPI:
    """Called by Serve inside the router's replica; the ingress exists when the first request asks for it."""

    def ingress() -> Ingress:
        return serve.get_replica_context().servable_object  # type: ignore[no-any-return]

    return build_http_api(lambda: ingress().router, lambda: ingress().calls)


@serve.ingress(http_api)
class Ingress(GrpcApi, KserveApi):
    """`config`: its models are those of `handles`, in their order."""

    def __init__(self, config: NibbleConfig, *handles: DeploymentHandle) -> None:
        lost_replica = asyncio.Event()
        self._traffic = Traffic()
        models = [
            ServeModel(model, handle, lost_replica, self._traffic)
            for model, handle in zip(config.models, handles, strict=True)
        ]
        self.router = Router({model.config.name: model for model in models}, config.limits)
        self.calls = Calls(Access(config.auth), config.logging)
        self._configs = list(config.models)
        self._watch = asyncio.get_running_loop().create_task(watch_readiness(APP_NAME, models, lost_replica))

    async def configs(self) -> list[ModelConfig]:
        """For `nibble status`: also of the models that have no replica to ask."""
        return self._configs

    async def first_answer(self, model: str, prompt: str, max_tokens: int) -> FirstAnswer:
        """For `nibble serve`."""
        return await first_answer(self.router.model(model), self._traffic, prompt, max_tokens)
