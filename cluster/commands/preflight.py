"""What can be told of a configuration before anything is started: whether its checkpoints can be converted, and whether
its replicas fit into memory. `nibble serve --dry-run` and `nibble convert --dry-run` print it and stop there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from cluster.config import ArtifactsConfig, NibbleConfig
from cluster.conversion.outline import Outline, read_outline
from cluster.conversion.wanted import Wanted, wanted_artifacts
from cluster.errors import ConfigError, HubUnavailableError
from cluster.machine.isa import available_memory, cpu_flags
from cluster.machine.topology import ThreadRoom, thread_room
from cluster.model_config import ModelConfig
from deployments.engines.needs import ADVICE, ReplicaNeeds, check_planned, gib, replica_needs


class Node(NamedTuple):
    """What counts of a node: bytes that are free there, its CPU's flags, and how many threads fit."""

    memory: int
    flags: frozenset[str]
    room: ThreadRoom


class PlannedModel(NamedTuple):
    """`field`: its place in the configuration. `outlines`: of the artifacts of `wanted_artifacts`."""

    field: str
    config: ModelConfig
    outlines: tuple[Outline, ...]

    def needs(self, node: Node) -> ReplicaNeeds:
        """Of a replica there."""
        return replica_needs(self.config, [(made.model, made.tensors) for made in self.outlines], node.flags)


def this_node() -> Node:
    return Node(available_memory(), cpu_flags(), thread_room())


def plan_models(
    config: NibbleConfig, outline: Callable[[Wanted, ArtifactsConfig], Outline] = read_outline
) -> list[PlannedModel]:
    """Raises CheckpointError or ConfigError for a model that can be neither converted nor run. A model whose Hub cannot
    be asked now is left out: its artifact may be somewhere in the cluster."""
    planned = []
    for index, model in enumerate(config.models):
        try:
            outlines = tuple(outline(wanted, config.artifacts) for wanted in wanted_artifacts(model))
        except HubUnavailableError:
            continue
        field = f"models[{index}]"
        check_planned(model, outlines[0].model, field)
        planned.append(PlannedModel(field, model, outlines))
    return planned


def plan_in_cluster(config: NibbleConfig) -> tuple[list[PlannedModel], list[Node]]:
    """As plan_models, but read where the checkpoints are: on the nodes of the cluster that this process is connected
    to, which come second."""
    import ray  # a second and 60 MB, which only this way costs

    from cluster.ray_errors import raised_here
    from cluster.restoring import alive_nodes, on_node

    outline, probe = ray.remote(num_cpus=0)(read_outline), ray.remote(num_cpus=0)(this_node)
    with raised_here():
        planned = plan_models(config, lambda wanted, artifacts: ray.get(outline.remote(wanted, artifacts)))
        nodes = ray.get([on_node(probe, node).remote() for node in alive_nodes()])
    return planned, nodes


def checked_in_cluster(config: NibbleConfig) -> list[str]:
    """What is to be told of the configuration there; raises as plan_in_cluster and check_fits_any do."""
    planned, nodes = plan_in_cluster(config)
    check_fits_any(planned, nodes)
    return thread_notes(planned, nodes)


def check_fits_any(planned: Sequence[PlannedModel], nodes: Sequence[Node]) -> None:
    """Raises ConfigError, with figures, for a model of which no node has room for one replica."""
    if not nodes:
        return
    largest = max(nodes, key=lambda node: node.memory)
    for each in planned:
        if all(each.needs(node).total > node.memory for node in nodes):
            raise ConfigError(
                f"{each.field} ({each.config.name}): a replica needs at least {each.needs(largest)} of memory, the node"
                f" with the most has {gib(largest.memory)} GiB free; use {ADVICE}"
            )


def thread_notes(planned: Sequence[PlannedModel], nodes: Sequence[Node]) -> list[str]:
    """A line for each model that has more threads than any node has room for where they are fast: on physical cores of
    their own, in one NUMA node. What no node can run waits for one that can."""
    notes: list[str] = []
    if not nodes:
        return notes
    most = ThreadRoom(*map(max, zip(*(node.room for node in nodes), strict=True)))
    for each in planned:
        threads = each.config.threads
        if threads > most.cpus:
            why = (
                f"no node has more than {most.cpus} CPUs for a replica (its cores, or the CPU quota); it waits for one"
            )
        elif threads > most.cores:
            why = f"no node has more than {most.cores} physical cores; threads that share one (SMT) add little"
        elif threads > most.numa_cores:
            why = f"no NUMA node has more than {most.numa_cores} cores; more replicas with fewer threads are faster"
        else:
            continue
        notes.append(f"{each.field}.threads: found {threads} ({each.config.name}), but {why}")
    return notes


def check_traces(config: NibbleConfig) -> None:
    """Raises ConfigError for traces that could not be exported from here. A node of another machine whose package is
    missing only warns."""
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if config.observability.traces and found is None:
        raise ConfigError("observability.traces: needs the extra otlp; pip install 'nibble-serve[otlp]'")


def check_fit_together(planned: Sequence[PlannedModel], node: Node) -> None:
    """Raises ConfigError, with figures, where `node` alone has no room for the least replicas of all models."""
    needed = {each.config.name: together(each, node) for each in planned}
    if sum(needed.values()) > node.memory:
        listed = ", ".join(f"{name} {gib(size)}" for name, size in needed.items())
        raise ConfigError(
            f"models: their replicas need at least {gib(sum(needed.values()))} GiB of memory together ({listed}), this"
            f" node has {gib(node.memory)} GiB free; use {ADVICE}"
        )


def together(planned: PlannedModel, node: Node) -> int:
    """Bytes of a model's least number of replicas on one node, which share its files; 0 where that is none."""
    needs, least = planned.needs(node), planned.config.replicas.min
    return needs.shared + least * needs.own if least else 0


def report(planned: Sequence[PlannedModel], nodes: Sequence[Node]) -> list[str]:
    """A few lines a model: what is to be converted, and what a replica needs, on the node with the most memory."""
    node = max(nodes, key=lambda node: node.memory)
    lines = []
    for each in planned:
        lines += [f"{each.config.name}: {describe_outline(made)}" for made in each.outlines]
        lines.append(f"{each.config.name}: a replica needs at least {each.needs(node)}")
    lines += thread_notes(planned, nodes)
    free = ", ".join(f"{gib(each.memory)} GiB" for each in nodes)
    return [*lines, f"memory free on {len(nodes)} node(s): {free}"]


def describe_outline(outline: Outline) -> str:
    wanted, size = outline.wanted, f"{outline.bytes / 1e6:.1f} MB"
    how = "in this node's cache" if outline.cached else f"{outline.shards} shard(s) to convert, unless a node has it"
    engines = " or ".join(outline.model.engines)
    return f"{wanted.source}: {wanted.family} {wanted.quantization}, {size}, for engine {engines}; {how}"
