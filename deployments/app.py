"""The composition root: one Serve application with the router as ingress and one deployment a model.

`build` serves `nibble serve`, `serve deploy` and a RayService alike:

    applications: [{name: nibble, import_path: deployments.app:build, args: {models: […]}}]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from rich.console import Console

from cluster.config import ROUTER_NAME, ArtifactsConfig, ModelConfig, NibbleConfig, parse_config
from cluster.conversion.wanted import Wanted, wanted_artifacts
from cluster.progress import ensure_artifacts
from deployments.api.access import load_keys
from deployments.api.grpc_api import SERVICER_FUNCTIONS
from deployments.engines.loading import ENVIRONMENT
from deployments.families import FAMILY_DEPLOYMENTS
from deployments.ingress import Ingress
from deployments.routing.request_router import LEAST_BUSY

# The router writes a line of each request itself, with more in it (`deployments/api/calls.py`); Serve's own two, one of
# them in the replica, only cost time.
LOGGING = {"enable_access_log": False}


def scaling(model: ModelConfig) -> dict[str, Any]:
    """A fixed number of replicas where there is nothing to scale: Serve's controller takes a sixth of a core to follow
    the load of a deployment that scales (Ray 2.60, 8 streams of 10 tokens/s), which is better the engine's."""
    replicas = model.replicas
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    autoscaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": model.target_ongoing_requests,
    }
    return {"autoscaling_config": autoscaling}


def model_deployment(model: ModelConfig, wanted: Sequence[Wanted], artifacts: ArtifactsConfig) -> Any:
    """A model's deployment: replicas of its family's class, each reserving as many CPUs as it has threads."""
    return (
        serve.deployment(FAMILY_DEPLOYMENTS[model.family])
        .options(
            name=model.name,
            ray_actor_options={
                "num_cpus": model.threads,
                "runtime_env": {"env_vars": ENVIRONMENT[model.engine]},
            },
            max_ongoing_requests=model.max_ongoing,
            max_queued_requests=model.queue.max_queued,
            request_router_config=RequestRouterConfig(request_router_class=LEAST_BUSY),
            logging_config=LOGGING,
            **scaling(model),
        )
        .bind(model, wanted, artifacts)
    )


def published_artifacts(config: NibbleConfig, console: Console | None = None) -> list[list[Wanted]]:
    """The artifacts of each model, by their addresses, once they are published. Raises as ensure_artifacts does."""
    wanted = [wanted_artifacts(model) for model in config.models]
    published = iter(ensure_artifacts([each for of_model in wanted for each in of_model], config.artifacts, console))
    return [
        [each.model_copy(update={"artifact_id": next(published).manifest.artifact_id}) for each in of_model]
        for of_model in wanted
    ]


def application(config: NibbleConfig, wanted: Sequence[Sequence[Wanted]]) -> Any:
    """The application of models whose artifacts, `wanted` in the order of the models, are published already: a replica
    then only fetches, and needs no CPU but its own."""
    # The router computes little, but a request holds a slot of it to its end: those a model may hold or queue.
    slots = sum(m.queue.max_queued + m.max_ongoing * m.replicas.max for m in config.models)
    ingress = serve.deployment(Ingress).options(
        name=ROUTER_NAME, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=slots + 100, logging_config=LOGGING
    )
    deployments = [
        model_deployment(model, of_model, config.artifacts)
        for model, of_model in zip(config.models, wanted, strict=True)
    ]
    return ingress.bind(config, *deployments)


def build(args: dict[str, Any]) -> Any:
    """`args`: the configuration as in the YAML file. Raises ConfigError. `http:` and `grpc:` belong to Serve's own
    http_options and grpc_options there."""
    config = parse_config(args, "args")
    if config.auth.api_keys_file is not None:
        load_keys(config.auth.api_keys_file)  # a mistake in it is told now
    return application(config, published_artifacts(config))


def grpc_options(port: int) -> dict[str, Any]:
    """Serve's gRPC options for nibble's services, reflection on."""
    return {"port": port, "grpc_servicer_functions": list(SERVICER_FUNCTIONS), "enable_reflection": True}
