"""`nibble status` and `nibble models`: what a cluster has, runs and waits for."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any, NamedTuple

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from rich.console import Console
from rich.table import Column, Table

from cluster.artifact_store import store_handle
from cluster.config import ROUTER_NAME, ModelConfig
from cluster.isa import available_cores, choose_isa
from cluster.restoring import on_node

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

    return NodeProbe(platform.node(), choose_isa(), available_cores())


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
    """Each node with the instruction set that the bigdl engine takes there unless the config says otherwise."""
    table = Table("node", "host", "address", "CPUs (Ray)", "cores", "instruction set", title="Nodes")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    refs = [on_node(probe_node, node["NodeID"]).remote() for node in nodes]
    for node, probe in zip(nodes, ray.get(refs, timeout=PROBE_TIMEOUT_S), strict=True):
        cpus = f"{node['Resources'].get('CPU', 0):g}"
        table.add_row(node["NodeID"][:8], probe.hostname, node["NodeManagerAddress"], cpus, str(probe.cores), probe.isa)
    return table


def models_table() -> Table:
    table = Table("model", "replicas", "engine", "isa", "threads", "cores", title="Models")
    deployments, waiting = serve_deployments(), waiting_cpus()
    for model, info in asyncio.run(served_models(deployments)) if deployments else ():
        state = deployment_state(deployments[model.name], model.threads, waiting)
        isa, cores = str(info.get("isa", "")), str(info.get("cores", ""))
        table.add_row(model.name, state, model.engine, isa, str(model.threads), cores)
    return table


async def served_models(deployments: dict[str, Any]) -> list[tuple[ModelConfig, dict[str, Any]]]:
    """Each model, and what one of its replicas says of itself. All on one event loop, to which the handles are bound
    where Serve is throughput-optimized."""
    return [
        (model, await ask(model.name, "info") if running(deployments[model.name]) else {})
        for model in await ask(ROUTER_NAME, "configs")
    ]


async def ask(deployment: str, method: str, *arguments: Any, timeout_s: float = PROBE_TIMEOUT_S) -> Any:
    from deployments.ingress import APP_NAME

    handle = ray_serve().get_deployment_handle(deployment, APP_NAME)
    return await asyncio.wait_for(getattr(handle, method).remote(*arguments), timeout_s)


def ray_serve() -> Any:
    """The module `ray.serve`, without the INFO lines that it logs on the driver's stderr from its import on."""
    from ray import serve

    logger = logging.getLogger("ray.serve")
    logger.setLevel(logging.WARNING)
    logger.addFilter(concerns_the_user)  # once, however often it is added
    return serve


def concerns_the_user(record: logging.LogRecord) -> bool:
    """False for Serve's error that the event loop of a handle has ended: here each loop lives for a few questions, and
    needs no news of replicas afterwards (ray.serve._private.long_poll, Ray 2.60)."""
    return "LongPollClient" not in record.getMessage()


def serve_deployments() -> dict[str, Any]:
    """Serve's view of nibble's deployments by name, empty while the application is not there."""
    from deployments.ingress import APP_NAME

    application = ray_serve().status().applications.get(APP_NAME)
    return dict(application.deployments) if application else {}


def running(deployment: Any) -> int:
    return int(deployment.replica_states.get("RUNNING", 0))


def waiting_cpus() -> Counter[float]:
    """How many actors and tasks wait for a node, by the CPUs that each of them needs."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    counts: Counter[float] = Counter()
    for demand in status.resource_demands.ray_task_actor_demand:
        for request in demand.bundles_by_count:
            counts[request.bundle.get("CPU", 0)] += request.count
    return counts


def deployment_state(deployment: Any, threads: int, waiting: Counter[float]) -> str:
    """How many replicas there are in which state, and what those that start wait for."""
    counts = {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items() if n}
    line = ", ".join(f"{n} {state.lower()}" for state, n in sorted(counts.items())) or "no replica yet"
    if set(counts) - {"RUNNING"} and waiting[threads]:
        free = ray.available_resources().get("CPU", 0)
        return f"{line}; waits for a node with {threads} free CPUs (in the whole cluster {free:g} are free)"
    # Serve's own words where a replica fails to start, say; not those that only tell how long it takes.
    told = deployment.message and SLOW_START not in deployment.message and not running(deployment)
    return f"{line}; {deployment.message}" if told else line
