"""The composition root: one Serve application a model, and one for the router, the only one with a route.

Each model's application is made from its own entry alone, so that a change of one model touches no other. `nibble
serve` and `nibble apply` deploy what `model_application` and `router_application` return; a rendered configuration
(`nibble render`), for `serve deploy` and a RayService, names `build_model` and `build_router`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from rich.console import Console

from cluster.config import ArtifactsConfig, LimitsConfig, NibbleConfig, parse_config
from cluster.conversion.wanted import Wanted, wanted_artifacts
from cluster.model_config import ROUTER_APP, ROUTER_NAME, ModelConfig, QueueConfig, ReplicasConfig
from cluster.nodes_config import NodesConfig
from cluster.progress import ensure_artifacts
from deployments.api.access import load_keys
from deployments.api.grpc.grpc_services import SERVICER_FUNCTIONS
from deployments.autoscaling import autoscaling_config
from deployments.engines.loading import ENVIRONMENT
from deployments.family_deployments import FAMILY_DEPLOYMENTS
from deployments.ingress import Ingress
from deployments.router_settings import RouterSettings

# The router writes a line of each request itself, with more in it (`deployments/api/calls.py`); Serve's own two, one of
# them in the replica, only cost time.
LOGGING = {"enable_access_log": False}
# Seconds. A replica that fails three checks in a row (Serve 2.60 has no setting for the number) is replaced.
HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 10}
# Serve's controller need not ask replicas for their numbers, and tell every router: /metrics asks them itself.
ASKED_AT_SCRAPES = RequestRouterConfig(request_routing_stats_period_s=86400)
# Seconds. Serve looks so often whether a replica that stops has requests left.
DRAIN_POLL_S = 0.5
# Seconds beyond the time to drain, in which a router tells the clients of streams that it ends.
DRAIN_MARGIN_S = 5


def scaling(model: ModelConfig) -> dict[str, Any]:
    """A fixed number of replicas where there is nothing to scale: Serve's controller takes a sixth of a core to follow
    the load of a deployment that scales (Ray 2.60, 8 streams of 10 tokens/s), which is better the engine's."""
    if model.replicas.scales:
        return {"autoscaling_config": autoscaling_config(model)}
    return {"num_replicas": model.replicas.min}


def draining(limits: LimitsConfig) -> dict[str, Any]:
    return {"graceful_shutdown_timeout_s": limits.drain + DRAIN_MARGIN_S, "graceful_shutdown_wait_loop_s": DRAIN_POLL_S}


def placement(nodes: NodesConfig | None) -> dict[str, Any]:
    return {} if nodes is None else nodes.actor_options


def replica_part(model: ModelConfig) -> ModelConfig:
    """What a replica is made from. The rest (how many there are, how many requests wait) changes without a restart."""
    return model.model_copy(
        update={"aliases": (), "replicas": ReplicasConfig(), "queue": QueueConfig(max_ongoing=model.queue.max_ongoing)}
    )


def model_version(model: ModelConfig, wanted: Sequence[Wanted], artifacts: ArtifactsConfig) -> str:
    """A digest of what its replicas are made from, the content of the checkpoint included where `wanted` knows it."""
    made_from = {
        "model": replica_part(model).model_dump(mode="json"),
        "wanted": [each.model_dump(mode="json") for each in wanted],
        "artifacts": artifacts.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def model_part(model: ModelConfig, limits: LimitsConfig) -> dict[str, Any]:
    """What of a model changes without a restart of its replicas."""
    return {
        "max_queued_requests": model.queue.max_queued,
        "user_config": {"stall_s": limits.stall_s},
        **scaling(model),
        **draining(limits),
    }


def app_name(model: ModelConfig, version: str) -> str:
    """A new version runs beside the old one, until it takes over: its application has another name."""
    return f"{model.deployment}.{version[:8]}"


def model_application(
    model: ModelConfig, wanted: Sequence[Wanted], artifacts: ArtifactsConfig, limits: LimitsConfig
) -> Any:
    """Replicas of the model's family, each reserving as many CPUs as it has threads. The artifacts in `wanted` are
    published already: a replica then only fetches, and needs no CPU but its own."""
    options = {
        "name": model.deployment,
        "ray_actor_options": {
            "num_cpus": model.threads,
            "runtime_env": {"env_vars": ENVIRONMENT[model.engine]},
            **placement(model.nodes),
        },
        "max_ongoing_requests": model.max_ongoing,
        "request_router_config": ASKED_AT_SCRAPES,
        "logging_config": LOGGING,
        **HEALTH,
        **model_part(model, limits),
    }
    deployment = serve.deployment(FAMILY_DEPLOYMENTS[model.family]).options(**options)
    bound = versioned(deployment, model_version(model, wanted, artifacts))
    return bound.bind(replica_part(model), wanted, artifacts)


def router_part(settings: RouterSettings) -> dict[str, Any]:
    """What of the router changes without a restart, but for `nodes`. Its replicas compute little, but a request holds a
    slot of one to its end: those that the models may hold or queue."""
    config = settings.config
    slots = sum(m.queue.max_queued + m.max_ongoing * m.replicas.max for m in config.models)
    return {
        "ray_actor_options": {"num_cpus": 0, **placement(config.router.nodes)},
        "num_replicas": config.router.replicas,
        "max_ongoing_requests": slots + 100,
        "user_config": settings.model_dump(mode="json", exclude_defaults=True),
        **draining(config.limits),
    }


def router_application(settings: RouterSettings | None) -> Any:
    """Without settings it serves nothing: a rendered configuration has them in its `deployments`."""
    options = {"name": ROUTER_NAME, "ray_actor_options": {"num_cpus": 0}, "logging_config": LOGGING, **HEALTH}
    if settings is not None:
        options |= router_part(settings)
    return versioned(serve.deployment(Ingress).options(**options), "1").bind()


def versioned(deployment: Any, version: str) -> Any:
    """Serve replaces the replicas of another version, and only those. Its public API gives each deploy a new one (Ray
    2.60; `version=` was removed), so that every deploy would restart everything."""
    return deployment.options(version=version, _internal=True)


def addressed(
    models: Sequence[ModelConfig], artifacts: ArtifactsConfig, console: Console | None = None
) -> list[list[Wanted]]:
    """The artifacts of each model, by their addresses, once they are published. Raises as ensure_artifacts does."""
    wanted = [wanted_artifacts(model) for model in models]
    published = iter(ensure_artifacts([each for of_model in wanted for each in of_model], artifacts, console))
    return [
        [each.model_copy(update={"artifact_id": next(published).manifest.artifact_id}) for each in of_model]
        for of_model in wanted
    ]


def build_model(args: dict[str, Any]) -> Any:
    """For a rendered configuration, which has the rest in its `deployments`. `args`: `model`, an entry of `models:`;
    `artifacts`, as in the YAML file. It converts what is not published yet. Raises ConfigError."""
    part = parse_config({"models": [args.get("model")], "artifacts": args.get("artifacts") or {}}, "args")
    (model,) = part.models
    (wanted,) = addressed(part.models, part.artifacts)
    return model_application(model, wanted, part.artifacts, part.limits)


def build_router(args: dict[str, Any]) -> Any:
    """For a rendered configuration, which has the router's settings in its `deployments`."""
    return router_application(None)


def check_keys(config: NibbleConfig) -> None:
    """Raises ConfigError for a keys' file that cannot be used."""
    if config.auth.api_keys_file is not None:
        load_keys(config.auth.api_keys_file)


def grpc_options(port: int) -> dict[str, Any]:
    """Serve's gRPC options for nibble's services, of which reflection is one."""
    return {"port": port, "grpc_servicer_functions": list(SERVICER_FUNCTIONS), "enable_reflection": False}


def rendered(config: NibbleConfig) -> dict[str, Any]:
    """The same configuration for `serve deploy` and a RayService's serveConfigV2.

    Serve builds an application anew whose args change, so what may change without a restart stands in `deployments`.
    """
    # Serve ends a model's old replicas before it starts new ones: requests wait meanwhile.
    settings = RouterSettings(
        config=config,
        apps={model.name: model.deployment for model in config.models},
        awaited=frozenset(model.name for model in config.models),
    )
    router = {
        "name": ROUTER_APP,
        "route_prefix": "/",
        "import_path": "deployments.app:build_router",
        "deployments": [{"name": ROUTER_NAME, **router_part(settings)}],
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.http.host, "port": config.http.port},
        "grpc_options": grpc_options(config.grpc.port),
        "applications": [router, *(rendered_model(model, config) for model in config.models)],
    }


def rendered_model(model: ModelConfig, config: NibbleConfig) -> dict[str, Any]:
    """Its application has the model's own name, a slash aside: in place of an old version, whose requests it awaits."""
    args = {
        "model": replica_part(model).model_dump(mode="json", exclude_defaults=True),
        "artifacts": config.artifacts.model_dump(mode="json", exclude_defaults=True),
    }
    return {
        "name": model.deployment,
        "route_prefix": None,
        "import_path": "deployments.app:build_model",
        "args": args,
        "deployments": [{"name": model.deployment, **model_part(model, config.limits)}],
    }
