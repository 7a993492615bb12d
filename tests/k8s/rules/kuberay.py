"""What KubeRay 1.7's operator refuses beyond the schema (ray-operator/controllers/ray/utils/validation.go)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tests.k8s.rules.manifests import Document, one

MAX_NAME = 47
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{LABEL}")
LABEL_VALUE = re.compile(rf"({LABEL})?")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
# Set by the operator alone, from gcsFaultToleranceOptions.
REDIS_ENV = ("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS")


def kuberay_findings(documents: Sequence[Document]) -> Iterator[str]:
    service = one(documents, "RayService")
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    name = service["metadata"]["name"]
    if len(name) > MAX_NAME or not DNS_LABEL.fullmatch(name):
        yield f"RayService {name}: its name must be a DNS label of at most {MAX_NAME} characters"
    if spec.get("upgradeStrategy", {}).get("type", "NewCluster") not in UPGRADES:
        yield f"upgradeStrategy.type: found {spec['upgradeStrategy']['type']}, allowed are {', '.join(UPGRADES)}"
    if "upgradeStrategy" in cluster:
        yield "rayClusterConfig.upgradeStrategy is refused in a RayService"
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headGroupSpec.headService.metadata.name must not be set"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not supported for a RayService"
    yield from group_findings("head", cluster["headGroupSpec"])
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield f"workerGroupSpecs: group names must differ, found {', '.join(names)}"
    for group in groups:
        yield from group_findings(f"group {group['groupName']}", group)
        yield from worker_findings(group, cluster)
    yield from autoscaler_findings(cluster)
    yield from fault_tolerance_findings(service)


def group_findings(where: str, group: Document) -> Iterator[str]:
    params = group.get("rayStartParams", {})
    if group.get("resources") and any(params.get(key) for key in RESOURCE_PARAMS):
        yield f"{where}: resources are set in both rayStartParams and resources"
    if "labels" in params:
        yield f"{where}: rayStartParams.labels is not supported; use the group's labels"
    for key, value in group.get("labels", {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield f"{where}: {key}={value} is no label"


def worker_findings(group: Document, cluster: Document) -> Iterator[str]:
    where = f"group {group['groupName']}"
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not cluster.get("enableInTreeAutoscaling") and (least is None or most is None):
        yield f"{where}: minReplicas and maxReplicas must be set without the autoscaler"
    least, most = least or 0, most if most is not None else least or 0
    if least < 0 or least > most:
        yield f"{where}: minReplicas {least} and maxReplicas {most} must be 0 or more, and in order"
    # Not refused, but the operator would move it there.
    if not least <= group.get("replicas", least) <= most:
        yield f"{where}: replicas {group['replicas']} is not within {least} to {most}"
    if group.get("suspend"):
        yield f"{where}: suspend needs a feature gate"
    if "idleTimeoutSeconds" in group and not (autoscaler_v2(cluster) and group["idleTimeoutSeconds"] >= 0):
        yield f"{where}: idleTimeoutSeconds needs autoscalerOptions.version v2, and 0 or more"
    if group.get("priority") and not autoscaler_v2(cluster):
        yield f"{where}: priority needs autoscalerOptions.version v2"


def autoscaler_v2(cluster: Document) -> bool:
    on = cluster.get("enableInTreeAutoscaling", False)
    return bool(on and cluster.get("autoscalerOptions", {}).get("version") == "v2")


def autoscaler_findings(cluster: Document) -> Iterator[str]:
    options = cluster.get("autoscalerOptions", {})
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    switched = environment(cluster["headGroupSpec"]).get("RAY_enable_autoscaler_v2")
    if switched is not None and ("version" in options or not cluster.get("enableInTreeAutoscaling")):
        yield "RAY_enable_autoscaler_v2 is set in the head: use enableInTreeAutoscaling and autoscalerOptions.version"
    if autoscaler_v2(cluster):
        for group in groups:
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            if policy != "Never":
                yield f"restartPolicy: found {policy}; with autoscaler v2 it must be Never or unset"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(each["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for each in options.get("env", [])):
        yield "autoscalerOptions.env: KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's own"


def fault_tolerance_findings(service: Document) -> Iterator[str]:
    cluster = service["spec"]["rayClusterConfig"]
    head, options = cluster["headGroupSpec"], cluster.get("gcsFaultToleranceOptions")
    params = head.get("rayStartParams", {})
    if {"redis-password", "redis-username"} & set(params) or set(REDIS_ENV) & set(environment(head)):
        yield "Redis' address, user and password must be in gcsFaultToleranceOptions alone"
    if options is not None and service["metadata"].get("annotations", {}).get("ray.io/ft-enabled"):
        yield "ray.io/ft-enabled and gcsFaultToleranceOptions are both set"
    if options is not None and "storage" in options and options.get("backend", "redis") == "redis":
        yield "gcsFaultToleranceOptions.storage is for backend rocksdb alone"


def environment(group: Document) -> dict[str, str | None]:
    container = group["template"]["spec"]["containers"][0]
    return {each["name"]: each.get("value") for each in container.get("env", [])}
