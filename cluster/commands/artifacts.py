"""`nibble artifacts`: what is kept where, whether it is undamaged, and removing it.

Of this machine's cache and the durable copy; with an address, of the caches of all nodes and the cluster's store too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from cluster.artifacts.durable import DurableCopy
from cluster.artifacts.manifest import Manifest
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig
from cluster.errors import ArtifactError


class Finding(NamedTuple):
    """An artifact at one place; `state` is what was found out about it there."""

    place: str
    artifact_id: str
    source: str
    family: str
    quantization: str
    bytes: int
    state: str


def list_artifacts(config: ArtifactsConfig, address: str | None, console: Console) -> None:
    show(collect(config, address, lambda place: place.list()), console)


def verify_artifacts(config: ArtifactsConfig, address: str | None, console: Console) -> None:
    """Reads every copy whole. Raises ArtifactError where one is damaged, after the table."""
    findings = collect(config, address, lambda place: place.verify())
    show(findings, console)
    damaged = [finding for finding in findings if finding.state != "undamaged"]
    if damaged:
        places = ", ".join(f"{finding.artifact_id} ({finding.place})" for finding in damaged)
        raise ArtifactError(f"damaged: {places}; a node's copy is fetched again when it is next used")


def remove_artifact(artifact_id: str, config: ArtifactsConfig, address: str | None, console: Console) -> None:
    """Raises ArtifactError where nothing was there to remove, or a running replica uses it."""
    findings = collect(config, address, lambda place: place.remove(artifact_id))
    show(findings, console)
    if not findings:
        raise ArtifactError(f"{artifact_id}: no such artifact; `nibble artifacts list` shows what there is")
    if any(finding.state == "in use" for finding in findings):
        raise ArtifactError(f"{artifact_id}: a replica uses it on some node; end the models that it serves first")


class CachePlace:
    """The cache of the node that this runs on."""

    def __init__(self, name: str, config: ArtifactsConfig) -> None:
        self.name = name
        self._cache = NodeCache(config.cache_dir)

    def list(self) -> Iterable[Finding]:
        return [finding(self.name, manifest, "cached") for manifest in self._cache.manifests()]

    def verify(self) -> Iterable[Finding]:
        states = {True: "undamaged", False: "damaged"}
        return [finding(self.name, each, states[self._cache.verify(each)]) for each in self._cache.manifests()]

    def remove(self, artifact_id: str) -> Iterable[Finding]:
        found = [manifest for manifest in self._cache.manifests() if manifest.artifact_id == artifact_id]
        with self._cache.locked(artifact_id):
            states = {True: "removed", False: "in use"}
            return [finding(self.name, manifest, states[self._cache.remove(artifact_id)]) for manifest in found]


class DurablePlace:
    def __init__(self, uri: str) -> None:
        self._copy = DurableCopy(uri)

    def list(self) -> Iterable[Finding]:
        return [finding(self._copy.uri, manifest, "kept") for manifest in self._copy.manifests()]

    def verify(self) -> Iterable[Finding]:
        return [finding(self._copy.uri, manifest, self._state(manifest)) for manifest in self._copy.manifests()]

    def remove(self, artifact_id: str) -> Iterable[Finding]:
        found = [manifest for manifest in self._copy.manifests() if manifest.artifact_id == artifact_id]
        return [finding(self._copy.uri, each, "removed") for each in found if self._copy.remove(artifact_id)]

    def _state(self, manifest: Manifest) -> str:
        try:
            self._copy.verify(manifest)
        except ArtifactError:
            return "damaged"
        return "undamaged"


def finding(place: str, manifest: Manifest, state: str) -> Finding:
    made = (manifest.artifact_id, manifest.source, manifest.family, manifest.quantization, manifest.bytes)
    return Finding(place, *made, state)


Ask = Callable[[Any], Iterable[Finding]]


def collect(config: ArtifactsConfig, address: str | None, ask: Ask) -> list[Finding]:
    """What `ask` finds at each place."""
    with cluster_at(address):
        findings = list(of_the_nodes(config, ask)) if address else list(ask(CachePlace("this machine", config)))
    if config.durable_uri is not None:
        findings += ask(DurablePlace(config.durable_uri))
    return findings


def cluster_at(address: str | None) -> Any:
    from cluster.ray_cluster import joined_cluster

    return joined_cluster(address) if address else nullcontext()


def of_the_nodes(config: ArtifactsConfig, ask: Ask) -> Iterable[Finding]:
    import ray

    from cluster.artifact_store import store_handle
    from cluster.restoring import alive_nodes, on_node

    task = ray.remote(num_cpus=0)(lambda name: list(ask(CachePlace(name, config))))
    nodes = alive_nodes()
    for findings in ray.get([on_node(task, node).remote(f"node {node[:8]}") for node in nodes]):
        for each in findings:
            if each.state in ("removed", "damaged"):
                # The store must not hand out what is gone, nor keep its chunks in memory.
                ray.get(store_handle().forget.remote(each.artifact_id))
            yield each


def show(findings: Iterable[Finding], console: Console) -> None:
    table = Table(Column("artifact", overflow="fold"), "source", "family", "type", "MB", "place", "state")
    for each in findings:
        size = f"{each.bytes / 1e6:.1f}"
        table.add_row(each.artifact_id, each.source, each.family, each.quantization, size, each.place, each.state)
    console.print(table)
