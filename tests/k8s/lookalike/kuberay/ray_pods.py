"""The pods that KubeRay 1.7 makes of a RayCluster: its labels, its `ray start` command, its variables.

After ray-operator/controllers/ray/common/pod.go (DefaultHeadPodTemplate, DefaultWorkerPodTemplate, BuildPod), without
what the look-alike does not run: the autoscaler's container, TLS, tokens, embedded GCS storage.
"""

from __future__ import annotations

import copy
import json
import random
import string
from typing import Any

from tests.k8s.lookalike.documents import Document, quantity

KEPT_BOOLEANS = ("log-color", "include-dashboard", "include-log-monitor")
GCS_PORT = "6379"
FIXED_LABELS = ("ray.io/node-type", "ray.io/group", "ray.io/cluster")


def suffix() -> str:
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=5))


def pod_document(cluster: Document, group: Document, head: bool) -> Document:
    """`group`: headGroupSpec or one of workerGroupSpecs. `cluster`: name, namespace, spec, uid, rayservice (whether one
    made it)."""
    template = copy.deepcopy(group["template"])
    metadata, spec = template.setdefault("metadata", {}), template["spec"]
    kind = "head" if head else "worker"
    group_name = "headgroup" if head else group["groupName"]
    metadata["namespace"] = cluster["namespace"]
    middle = kind if head else f"{group_name}-worker"
    metadata["name"] = f"{cluster['name'][:50]}-{middle}-{suffix()}"
    metadata["labels"] = labels(cluster, kind, group_name, {**metadata.get("labels", {}), **group.get("labels", {})})
    container = spec["containers"][0]
    port = cluster["spec"]["headGroupSpec"].get("rayStartParams", {}).get("port", GCS_PORT)
    parameters = start_parameters(cluster, group, head, f"{head_service(cluster)}:{port}", container)
    add_fault_tolerance(cluster, parameters, container, head)
    start = " ".join(["ray start", *(["--head"] if head else []), *flags(parameters)])
    own = [*container.get("command", []), *container.get("args", [])]
    before = [" ".join(own), "&&"] if own else []
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [" ".join([*before, "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536};", start])]
    if not head:
        spec.setdefault("initContainers", []).append(wait_for_gcs(container, f"{head_service(cluster)}:{port}"))
    add_environment(container, start, "127.0.0.1" if head else head_service(cluster), port, head)
    add_shared_memory(spec, container)
    return template  # type: ignore[no-any-return]


def head_service(cluster: Document) -> str:
    return f"{cluster['name']}-head-svc.{cluster['namespace']}.svc.cluster.local"


def labels(cluster: Document, kind: str, group: str, chosen: dict[str, str]) -> dict[str, str]:
    own = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster["name"],
        "ray.io/node-type": kind,
        "ray.io/group": group,
        "ray.io/identifier": f"{cluster['name']}-{kind}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    own |= {name: value for name, value in chosen.items() if name not in FIXED_LABELS}
    own["ray.io/serve"] = "false" if kind == "head" else "true"
    return own


def start_parameters(
    cluster: Document, group: Document, head: bool, address: str, container: Document
) -> dict[str, str]:
    """rayStartParams with what KubeRay adds to them."""
    chosen = {name: str(value) for name, value in group.get("rayStartParams", {}).items()}
    resources = group.get("resources", {})
    others: dict[str, float] = {}
    for name, value in resources.items():
        key = {"cpu": "num-cpus", "memory": "memory"}.get(name.lower())
        if key is None:
            others[name] = quantity(value)
        else:
            chosen[key] = str(int(quantity(value)))
    if others:
        chosen["resources"] = f"'{json.dumps(others, separators=(',', ':'), sort_keys=True)}'"
    if group.get("labels"):
        chosen["labels"] = ",".join(f"{name}={group['labels'][name]}" for name in sorted(group["labels"]))
    if head:
        chosen.setdefault("dashboard-host", "0.0.0.0")
    else:
        chosen.setdefault("address", address)
    chosen.setdefault("metrics-export-port", "8080")
    chosen["block"] = "true"
    chosen.setdefault("dashboard-agent-listen-port", "52365")
    limits = container.get("resources", {}).get("limits", {})
    cpu = limits.get("cpu") or container.get("resources", {}).get("requests", {}).get("cpu")
    if cpu is not None:
        chosen.setdefault("num-cpus", str(int(-(-quantity(cpu) // 1))))
    if "memory" in limits:
        chosen.setdefault("memory", str(int(quantity(limits["memory"]))))
    return chosen


def flags(parameters: dict[str, str]) -> list[str]:
    found = []
    for name in sorted(parameters):
        value = parameters[name]
        if value.lower() in ("true", "false") and name not in KEPT_BOOLEANS:
            found += [f"--{name}"] if value.lower() == "true" else []
        else:
            found.append(f"--{name}={value}")
    return found


def add_fault_tolerance(cluster: Document, parameters: dict[str, str], container: Document, head: bool) -> None:
    """gcsFaultToleranceOptions with Redis."""
    options = cluster["spec"].get("gcsFaultToleranceOptions")
    if not options:
        return
    if not head:
        default(container, "RAY_gcs_rpc_server_reconnect_timeout_s", "600")
        return
    default(container, "RAY_external_storage_namespace", options.get("externalStorageNamespace", cluster["uid"]))
    variables = container.setdefault("env", [])
    variables.append({"name": "RAY_REDIS_ADDRESS", "value": options["redisAddress"]})
    for field, name in (("redisUsername", "REDIS_USERNAME"), ("redisPassword", "REDIS_PASSWORD")):
        if field in options:
            parameters[name.lower().replace("_", "-")] = f"${name}"
            variables.append({"name": name, **options[field]})


def wait_for_gcs(container: Document, address: str) -> Document:
    """Like KubeRay's init container, without its 200m of CPU: on a small machine they take half a minute."""
    script = f"until ray health-check --address {address}; do sleep 5; done"
    kept = {
        name: copy.deepcopy(container[name])
        for name in ("env", "envFrom", "volumeMounts", "securityContext")
        if name in container
    }
    return {"name": "wait-gcs-ready", "command": ["/bin/bash", "-c", "--"], "args": [script], **kept}


def add_environment(container: Document, start: str, host: str, port: str, head: bool) -> None:
    variables: list[dict[str, Any]] = container.setdefault("env", [])
    if not head:
        variables += [{"name": "FQ_RAY_IP", "value": host}, {"name": "RAY_IP", "value": host.split(".")[0]}]
    fields = {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }
    variables += [{"name": n, "valueFrom": {"fieldRef": {"fieldPath": path}}} for n, path in fields.items()]
    variables.append({"name": "KUBERAY_GEN_RAY_START_CMD", "value": start})
    default(container, "RAY_PORT", port)
    default(container, "RAY_timeout_ms_task_wait_for_death_info", "0")
    default(container, "RAY_gcs_server_request_timeout_seconds", "5")
    default(container, "RAY_SERVE_KV_TIMEOUT_S", "5")
    default(container, "RAY_ADDRESS", f"{host}:{port}")
    default(container, "RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    default(container, "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1")


def default(container: Document, name: str, value: str) -> None:
    variables = container.setdefault("env", [])
    if all(each["name"] != name for each in variables):
        variables.append({"name": name, "value": value})


def add_shared_memory(spec: Document, container: Document) -> None:
    """/dev/shm as large as the container's memory, where the template has none."""
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        return
    limits = container.get("resources", {}).get("limits", {})
    volume = {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": limits.get("memory", "1Gi")}}
    spec.setdefault("volumes", []).append(volume)
    mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
