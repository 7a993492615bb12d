"""`nibble status` and `nibble models`: what a cluster has, runs and waits for."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from rich.console import Console
from rich.table import Column, Table

from cluster.artifact_store import store_handle
from cluster.errors import NibbleError
from cluster.machine.isa import available_cores, isa_name
from cluster.model_config import ROUTER_APP, ROUTER_NAME, ModelConfig
from cluster.node_labels import unmet
from cluster.restoring import on_node
from cluster.serve_settings import SERVE_LOGGER, SERVING_STATES

if TYPE_CHECKING:
    from deployments.router_settings import RouterSettings

T = TypeVar("T")

PROBE_TIMEOUT_S = 30
# Of the messages by which Ray Serve 2.60 warns of a replica that takes more than 30 s to be scheduled or to initialize
# (SLOW_STARTUP_WARNING_S in ray/serve/_private/constants.py), in a deployment's status too.
SLOW_START = "have taken more than"


class NodeProbe(NamedTuple):
    hostname: str
    isa: str
    cores: int


@ray.remote(num_cpus=0)
def probe_node() -> NodeProbe:
    import platform

    return NodeProbe(platform.node(), isa_name(), available_cores())


def status(console: Console) -> None:
    """Of the cluster that this process is connected to."""
    console.print(nodes_table())
    console.print(models_table())
    store = store_handle()
    for progress in ray.get(store.progress.remote()):
        console.print(f"{progress.stage} {progress.source}: {progress.bytes_done} of {progress.bytes} bytes")
    table = Table(
        Column("artifact", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("source", "family", "type", "MB", "chunks")),
        title="Artifacts",
    )
    for manifest in ray.get(store.manifests.remote()):
        size, chunks = f"{manifest.bytes / 1e6:.1f}", str(len(manifest.chunks))
        table.add_row(manifest.artifact_id, manifest.source, manifest.family, manifest.quantization, size, chunks)
    console.print(table)


def nodes_table() -> Table:
    """Each node with the instruction set that the bigdl engine takes there unless the config says otherwise, or the
    architecture of one that cannot run it."""
    table = Table("node", "host", "address", "CPUs (Ray)", "cores", "instruction set", title="Nodes")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    refs = [on_node(probe_node, node["NodeID"]).remote() for node in nodes]
    for node, probe in zip(nodes, ray.get(refs, timeout=PROBE_TIMEOUT_S), strict=True):
        cpus = f"{node['Resources'].get('CPU', 0):g}"
        table.add_row(node["NodeID"][:8], probe.hostname, node["NodeManagerAddress"], cpus, str(probe.cores), probe.isa)
    return table


def models_table() -> Table:
    table = Table("model", "replicas", "engine", "isa", "threads", "cores", title="Models")
    waiting, labels = waiting_cpus(), node_labels()
    for model, deployment, info in run(served_models()):
        state = deployment_state(deployment, model, waiting, labels)
        isa, cores = str(info.get("isa", "")), str(info.get("cores", ""))
        table.add_row(model.name, state, model.engine, isa, str(model.threads), cores)
    return table


_loop: asyncio.AbstractEventLoop | None = None


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns. Always on the same event loop, to which Serve binds each handle for good where it is
    throughput-optimized."""
    global _loop
    _loop = _loop or asyncio.new_event_loop()
    return _loop.run_until_complete(coroutine)


async def served_models() -> list[tuple[ModelConfig, Any, dict[str, Any]]]:
    """Each model, Serve's view of its deployment, and what one of its replicas says of itself."""
    settings, found = await router_settings(), []
    if settings is None:
        return []
    applications = serve_applications()
    for model in settings.config.models:
        app = settings.apps[model.name]
        deployment = deployment_of(applications, app, model.deployment)
        if deployment is not None:
            info = await replica_info(model.name) if running(deployment) else {}
            found.append((model, deployment, info))
    return found


async def replica_info(model: str) -> dict[str, Any]:
    """What one of its replicas says of itself, by way of the router; empty where none answers."""
    info: dict[str, Any] = await ask(ROUTER_NAME, "replica_info", model)
    return info


async def router_settings() -> RouterSettings | None:
    """What the router in this cluster serves; None where there is no router. Raises NibbleError where it does not run:
    what it serves is not known then."""
    router = deployment_of(serve_applications(), ROUTER_APP, ROUTER_NAME)
    if router is None:
        return None
    if not running(router):
        raise NibbleError("the router of this cluster does not run at the moment; try again when it does")
    settings: RouterSettings | None = await ask(ROUTER_NAME, "settings")
    return settings


async def ask(
    deployment: str, method: str, *arguments: Any, app: str = ROUTER_APP, timeout_s: float = PROBE_TIMEOUT_S
) -> Any:
    handle = ray_serve().get_deployment_handle(deployment, app)
    return await asyncio.wait_for(getattr(handle, method).remote(*arguments), timeout_s)


def ray_serve() -> Any:
    """The module `ray.serve`, without the INFO lines that it logs on the driver's stderr from its import on."""
    from ray import serve

    logger = logging.getLogger(SERVE_LOGGER)
    logger.setLevel(logging.WARNING)
    logger.addFilter(concerns_the_user)  # once, however often it is added
    return serve


def concerns_the_user(record: logging.LogRecord) -> bool:
    """False for Serve's error that the event loop of a handle has ended: here each loop lives for a few questions, and
    needs no news of replicas afterwards (ray.serve._private.long_poll, Ray 2.60)."""
    return "LongPollClient" not in record.getMessage()


def serve_applications() -> Mapping[str, Any]:
    """Serve's view of all applications, by name."""
    applications: Mapping[str, Any] = ray_serve().status().applications
    return applications


def deployment_of(applications: Mapping[str, Any], app: str, name: str) -> Any:
    """Serve's view of a deployment, None while it is not there."""
    application = applications.get(app)
    return application.deployments.get(name) if application else None


def running(deployment: Any) -> int:
    return sum(int(deployment.replica_states.get(state, 0)) for state in SERVING_STATES)


def waiting_cpus() -> Counter[float]:
    """How many actors and tasks wait for a node, by the CPUs that each of them needs."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    counts: Counter[float] = Counter()
    for demand in status.resource_demands.ray_task_actor_demand:
        for request in demand.bundles_by_count:
            counts[request.bundle.get("CPU", 0)] += request.count
    return counts


def node_labels() -> list[dict[str, str]]:
    """Of each node."""
    return [node["Labels"] for node in ray.nodes() if node["Alive"]]


def deployment_state(
    deployment: Any, model: ModelConfig, waiting: Counter[float], labels: Sequence[Mapping[str, str]]
) -> str:
    """How many replicas there are in which state, and what those that start wait for: CPUs, or a label of a node."""
    if model.replicas.min == 0 and not any(deployment.replica_states.values()) and not deployment.message:
        return "idle; its next request starts a replica"
    counts = {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items() if n}
    line = ", ".join(f"{n} {state.lower()}" for state, n in sorted(counts.items())) or "no replica yet"
    if set(counts) - {*SERVING_STATES}:
        if model.nodes and (lacking := unmet(model.nodes, labels)):
            return f"{line}; {lacking}"
        if waiting[model.threads]:
            free = ray.available_resources().get("CPU", 0)
            return f"{line}; waits for a node with {model.threads} free CPUs (in the whole cluster {free:g} are free)"
    # Serve's own words where a replica fails to start, say; not those that only tell how long it takes.
    told = deployment.message and SLOW_START not in deployment.message and not running(deployment)
    return f"{line}; {deployment.message}" if told else line
