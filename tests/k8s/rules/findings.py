"""What must hold between the parts of rendered manifests, and nibble's own demands on pods. Each rule yields findings.

`findings` is all of it: the schemas, KubeRay's rules, and these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import ray
from ray.serve.schema import ServeDeploySchema

from cluster.commands.drain import head_drain_s
from cluster.config import NibbleConfig, parse_config
from cluster.node_labels import unmet
from cluster.serve_settings import serve_settings
from deployments.app import DRAIN_MARGIN_S, rendered
from tests.k8s.rules.kuberay import kuberay_findings
from tests.k8s.rules.manifests import Document, Pod, cluster_spec, of_kind, one, pods, read_yaml, serve_document
from tests.k8s.rules.network import network_findings
from tests.k8s.rules.pods import pod_findings, quantity
from tests.k8s.rules.schema import VERSIONS, schema_findings

Rule = Callable[[Sequence[Document]], Iterator[str]]
CONFIG, SETTINGS = "nibble-config", "nibble-serve-settings"
CONFIG_FILE = "nibble.yaml"


def findings(documents: Sequence[Document], versions: Sequence[str] = VERSIONS) -> list[str]:
    """Empty for manifests that are sound. `versions`: of Kubernetes."""
    found = [finding for document in documents for finding in schema_findings(document, versions)]
    for pod in pods(documents):
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "labels": pod.labels}, "spec": pod.spec}
        found += [f"{pod.where}: {finding}" for finding in schema_findings(made, versions)]
    if not found:  # the rules read what the schemas promise
        found = [finding for rule in RULES for finding in rule(documents)]
    return found


def configuration(documents: Sequence[Document]) -> NibbleConfig:
    return parse_config(read_yaml(one(documents, "ConfigMap", CONFIG)["data"][CONFIG_FILE]), CONFIG_FILE)


def namespaces(documents: Sequence[Document]) -> Iterator[str]:
    (namespace,) = (each["metadata"]["name"] for each in of_kind(documents, "Namespace"))
    for document in documents:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != namespace:
            yield f"{document['kind']} {document['metadata']['name']}: is not in namespace {namespace}"


def serve_config(documents: Sequence[Document]) -> Iterator[str]:
    """serveConfigV2 is `nibble render` of the ConfigMap's nibble.yaml, and names nothing that Serve does not know."""
    document, expected = serve_document(documents), rendered(configuration(documents))
    if document != expected:
        yield f"serveConfigV2 is not what `nibble render` makes of ConfigMap {CONFIG}; run `make k8s`"
    for where, unknown in unknown_fields(ServeDeploySchema, document):
        yield f"serveConfigV2: Serve does not know {where}{unknown}"


def unknown_fields(model: Any, values: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Keys that a pydantic model would ignore, with the place of each; in models within it, too."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            yield where, key
            continue
        nested = next((t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")), None)
        for part in value if isinstance(value, list) else [value]:
            if nested is not None and isinstance(part, dict):
                yield from unknown_fields(nested, part, f"{where}{key}.")


def settings(documents: Sequence[Document]) -> Iterator[str]:
    """Every container of the cluster has the environment that cluster/serve_settings.py lists."""
    data = one(documents, "ConfigMap", SETTINGS)["data"]
    if data != serve_settings(configuration(documents).limits):
        yield f"ConfigMap {SETTINGS} is not what cluster/serve_settings.py lists; run `make k8s`"
    for pod in pods(documents):
        for container in pod.containers if pod.ray else ():
            sources = [each.get("configMapRef", {}).get("name") for each in container.get("envFrom", [])]
            if SETTINGS not in sources:
                yield f"{pod.where}, container {container['name']}: envFrom lacks ConfigMap {SETTINGS}"
            own = {each["name"] for each in container.get("env", [])} & set(data)
            if own:
                yield f"{pod.where}, container {container['name']}: env overrides {', '.join(sorted(own))}"


def versions(documents: Sequence[Document]) -> Iterator[str]:
    spec = cluster_spec(documents)
    if spec.get("rayVersion") != ray.__version__:
        yield f"rayVersion: found {spec.get('rayVersion')}, nibble is built with {ray.__version__}"
    images = {container["image"] for pod in pods(documents) if pod.ray for container in pod.containers}
    if len(images) != 1:
        yield f"head and workers must have one image, found {', '.join(sorted(images))}"


def times(documents: Sequence[Document]) -> Iterator[str]:
    """Nothing is cut by a change: request < drain < grace period, and the old cluster of an upgrade outlives both."""
    limits = configuration(documents).limits
    service = one(documents, "RayService")["spec"]
    for pod in pods(documents):
        if not pod.ray:
            continue
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        drain = head_drain_s(limits)
        if grace <= drain:
            yield f"{pod.where}: terminationGracePeriodSeconds is {grace}, its drain takes up to {drain:g} s"
        hook = pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if hook != ["nibble", "drain", f"{mounted_at(pod, CONFIG)}/{CONFIG_FILE}"]:
            yield f"{pod.where}: preStop is '{' '.join(hook)}', expected nibble drain with ConfigMap {CONFIG}"
    delay = service.get("rayClusterDeletionDelaySeconds", 60)
    if delay <= limits.drain + DRAIN_MARGIN_S:
        yield f"rayClusterDeletionDelaySeconds is {delay}, a request may take {limits.drain:g} s"
    for route in of_kind(documents, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            timeout = rule.get("timeouts", {}).get("request", "0s")
            if (
                limits.timeout_s is not None
                and timeout != "0s"
                and float(timeout.removesuffix("s")) <= limits.timeout_s
            ):
                yield f"HTTPRoute: timeouts.request is {timeout}, limits.timeout_s is {limits.timeout_s}"
    if service.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "upgradeStrategy.type is not NewCluster: the incremental upgrade has no route for gRPC"


def mounted_at(pod: Pod, config_map: str) -> str | None:
    """Where a ConfigMap's files are in Ray's container."""
    volumes = {each["name"]: each.get("configMap", {}).get("name") for each in pod.spec.get("volumes", [])}
    mounts = (each for each in pod.main.get("volumeMounts", []) if volumes.get(each["name"]) == config_map)
    return next((str(each["mountPath"]) for each in mounts), None)


def folders(documents: Sequence[Document]) -> Iterator[str]:
    """What nibble.yaml names in the pods is mounted there."""
    config, spec = configuration(documents), cluster_spec(documents)
    for pod in pods(documents):
        if not pod.ray:
            continue
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        mounts = {each["mountPath"]: volumes.get(each["name"], {}) for each in pod.main["volumeMounts"]}
        cache = mounts.get(str(config.artifacts.cache_dir), {})
        if not {"emptyDir", "hostPath", "ephemeral"} & set(cache):
            yield f"{pod.where}: artifacts.cache_dir {config.artifacts.cache_dir} is no volume of its own"
        keys = config.auth.api_keys_file
        if keys is not None and "secret" not in mounts.get(str(keys.parent), {}):
            yield f"{pod.where}: auth.api_keys_file {keys} is in no Secret's folder"
        sources = [each.get("secretRef", {}).get("name") for each in pod.main.get("envFrom", [])]
        if (config.artifacts.durable_uri or "").startswith("s3:") and "nibble-s3" not in sources:
            yield f"{pod.where}: artifacts.durable_uri is an s3:// one, envFrom lacks Secret nibble-s3"
    if spec["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: rayStartParams.num-cpus is not "0": replicas would run beside the controller'


def placement(documents: Sequence[Document]) -> Iterator[str]:
    """Each model fits on a pod of some group whose labels it asks for; all that must run fits on what must be there."""
    config, groups = configuration(documents), [pod for pod in pods(documents) if pod.ray and not pod.head]
    labels = [{**pod.group.get("labels", {}), "ray.io/node-group": pod.labels["ray.io/group"]} for pod in groups]
    for model in config.models:
        lacking = unmet(model.nodes, labels) if model.nodes else None
        if lacking:
            yield f"models {model.name}: {lacking}"
        if model.threads > max(map(cpus, groups), default=0):
            yield f"models {model.name}: {model.threads} threads, a worker has at most {max(map(cpus, groups)):g} CPUs"
    router = config.router.nodes
    if router is None or unmet(router, [*labels]) or not unmet(router, [{"ray.io/node-group": "headgroup"}]):
        yield "router.nodes: it must run on workers, and not on the head"
    there = sum(cpus(pod) * pod.group.get("replicas", pod.group.get("minReplicas", 0)) for pod in groups)
    if config.threads > there:
        yield f"models: their replicas need {config.threads} CPUs, the workers have {there:g}"


def cpus(pod: Pod) -> float:
    """As Ray counts them."""
    return quantity(pod.params.get("num-cpus") or pod.main["resources"]["limits"]["cpu"])


def disruptions(documents: Sequence[Document]) -> Iterator[str]:
    workers = [pod for pod in pods(documents) if pod.ray and not pod.head]
    for budget in of_kind(documents, "PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        if not isinstance(spec.get("minAvailable"), int):
            yield f"PodDisruptionBudget {name}: only an integer minAvailable works, a RayCluster has no scale"
            continue
        chosen = [pod for pod in workers if spec["selector"]["matchLabels"].items() <= pod.labels.items()]
        count = sum(pod.group.get("replicas", 0) for pod in chosen)
        if chosen != workers or spec["minAvailable"] >= count:
            yield f"PodDisruptionBudget {name}: {spec['minAvailable']} of {count} workers: no node could be drained"


RULES: tuple[Rule, ...] = (
    namespaces,
    kuberay_findings,
    pod_findings,
    network_findings,
    serve_config,
    settings,
    versions,
    times,
    folders,
    placement,
    disruptions,
)
