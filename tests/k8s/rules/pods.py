"""What every pod must be: Pod Security "restricted", whole CPUs of its own, memory that fits, volumes and probes that
are there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cluster.config import LimitsConfig
from cluster.serve_settings import serve_settings
from tests.k8s.rules.manifests import Document, Pod, cluster_spec, of_kind, one, pods

RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
ENFORCE = "pod-security.kubernetes.io/enforce"
# Secrets that a user makes; the manifests have none.
SECRETS = {"nibble-keys", "nibble-redis", "nibble-s3", "nibble-metrics"}
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
# Bytes that Ray's own processes and a replica's need beside the object store.
HEAP_BYTES = 2 << 30
# Of Ray's container: where Ray and nibble write.
WRITTEN = ("/tmp", "/dev/shm")
AGENT_PORT = 52365  # of the dashboard's agent, unless rayStartParams say otherwise


def quantity(text: object) -> float:
    """Kubernetes' notation of a number: 500m, 8, 16Gi."""
    matched = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert matched, f"{text!r} is no quantity"
    return float(matched[1]) * UNITS[matched[2]]


def pod_findings(documents: Sequence[Document]) -> Iterator[str]:
    namespace = one(documents, "Namespace")
    level = namespace["metadata"].get("labels", {}).get(ENFORCE)
    host_paths = any("hostPath" in volume for pod in pods(documents) for volume in pod.spec.get("volumes", []))
    if level != ("privileged" if host_paths else "restricted"):
        yield f"Namespace: {ENFORCE} is {level}; restricted without hostPath volumes, privileged with them"
    config_maps = {each["metadata"]["name"] for each in of_kind(documents, "ConfigMap")}
    for pod in pods(documents):
        for finding in (*pod_security(pod, host_paths), *resources(pod), *memory(pod), *volumes(pod, config_maps)):
            yield f"{pod.where}: {finding}"
        for finding in (*probes(pod), *token(pod, documents)):
            yield f"{pod.where}: {finding}"


def pod_security(pod: Pod, host_paths: bool) -> Iterator[str]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, restricted; and a read-only root."""
    spec = pod.spec
    for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        if spec.get(field):
            yield f"{field} is set"
    allowed = RESTRICTED_VOLUMES | ({"hostPath"} if host_paths else set())
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= allowed:
            yield f"volume {volume['name']}: {', '.join(kinds)} is not allowed"
    if spec.get("securityContext", {}).get("sysctls"):
        yield "sysctls are set"
    for container in (*pod.containers, *spec.get("initContainers", [])):
        for finding in container_security(container, spec.get("securityContext", {})):
            yield f"container {container['name']}: {finding}"


def container_security(container: Document, of_pod: Document) -> Iterator[str]:
    own = container.get("securityContext", {})
    context = of_pod | own
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities: must drop ALL"
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "runAsNonRoot is not true, or runAsUser is 0 or missing"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile is not RuntimeDefault"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "hostPort is set"


def resources(pod: Pod) -> Iterator[str]:
    """The static CPU manager gives cores to containers with whole CPUs in a pod whose requests are its limits."""
    for container in (*pod.containers, *pod.spec.get("initContainers", [])):
        requests, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
        if requests != limits or not {"cpu", "memory"} <= set(limits):
            yield f"container {container['name']}: requests must be limits, and have cpu and memory"
        elif quantity(limits["cpu"]) % 1:
            yield f"container {container['name']}: cpu is {limits['cpu']}, must be whole CPUs"
    if pod.ray and pod.group.get("resources") is not None:
        yield "resources of the group: Ray counts those of the container"


def memory(pod: Pod) -> Iterator[str]:
    """Pages of /dev/shm count against the container's memory."""
    if not pod.ray:
        return
    given = {each["name"]: each for each in pod.spec["volumes"]}
    names = [each["name"] for each in pod.main.get("volumeMounts", []) if each["mountPath"] == "/dev/shm"]
    if not names or given[names[0]].get("emptyDir", {}).get("medium") != "Memory":
        yield "/dev/shm is no emptyDir of medium Memory"
        return
    size = quantity(given[names[0]]["emptyDir"].get("sizeLimit", 0))
    store, limit = float(pod.params.get("object-store-memory", 0)), quantity(pod.main["resources"]["limits"]["memory"])
    if not 0 < store <= size:
        yield f"rayStartParams.object-store-memory is {store:g}, /dev/shm has {size:g}"
    if size + HEAP_BYTES > limit:
        yield f"/dev/shm of {size:g} bytes and a heap of {HEAP_BYTES} do not fit in memory of {limit:g}"


def volumes(pod: Pod, config_maps: set[str]) -> Iterator[str]:
    given = {each["name"]: each for each in pod.spec.get("volumes", [])}
    used = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
    if pod.ray and used != set(given):
        yield f"volumes and mounts differ in {', '.join(sorted(used ^ set(given)))}"
    for volume in given.values():
        if "configMap" in volume and volume["configMap"]["name"] not in config_maps:
            yield f"volume {volume['name']}: there is no ConfigMap {volume['configMap']['name']}"
        if "secret" in volume and volume["secret"]["secretName"] not in SECRETS:
            yield f"volume {volume['name']}: nobody makes Secret {volume['secret']['secretName']}"
    for container in pod.containers:
        for source in container.get("envFrom", []):
            if source.get("configMapRef", {}).get("name") not in {*config_maps, None}:
                yield f"container {container['name']}: there is no ConfigMap {source['configMapRef']['name']}"
            if source.get("secretRef", {}).get("name") not in {*SECRETS, None}:
                yield f"container {container['name']}: nobody makes Secret {source['secretRef']['name']}"
        mounts = {each["mountPath"] for each in container.get("volumeMounts", []) if not each.get("readOnly")}
        for path in WRITTEN if pod.ray and container is pod.main else ():
            if path not in mounts:
                yield f"container {container['name']}: {path} is not writable"
        if pod.ray and {"name": "HOME", "value": "/tmp"} not in container.get("env", []):
            yield f"container {container['name']}: HOME is not /tmp, and the rest is read-only"
        if pod.ray and "/tmp" not in mounts:
            yield f"container {container['name']}: mounts no /tmp"


def probes(pod: Pod) -> Iterator[str]:
    """Of the paths and ports that answer: Serve's proxy on a worker, the dashboard's agent on every node."""
    ports = {port["name"]: port["containerPort"] for port in pod.main.get("ports", [])}
    agent = int(pod.params.get("dashboard-agent-listen-port", AGENT_PORT))
    expected = {"livenessProbe": ("/api/healthz", agent), "readinessProbe": ("/api/healthz", agent)}
    if pod.ray and not pod.head:
        expected["readinessProbe"] = ("/-/healthz", ports.get("serve"))
    for name, wanted in expected.items():
        probe = pod.main.get(name, {})
        if not pod.ray:
            port = probe.get("tcpSocket", {}).get("port")
            if ports.get(port, port) not in ports.values():
                yield f"{name}: no container port {port}"
            continue
        get = probe.get("httpGet", {})
        found = (get.get("path"), ports.get(get.get("port"), get.get("port")))
        if found != wanted:
            yield f"{name}: asks {found[0]} on port {found[1]}, expected {wanted[0]} on {wanted[1]}"
    if pod.ray and not pod.head:
        probe = pod.main.get("readinessProbe", {})
        patience = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        drains = float(serve_settings(LimitsConfig())["RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S"])
        if not drains / 2 <= patience < drains:
            yield (
                f"readinessProbe: fails after {patience} s (periodSeconds times failureThreshold), expected"
                f" {drains / 2:g} to {drains:g}: HAProxy ends after that on a node that drains,"
                " another node's has to be ready by then"
            )


def token(pod: Pod, documents: Sequence[Document]) -> Iterator[str]:
    """Of the API server's, only the autoscaler makes use."""
    wanted = pod.head and bool(cluster_spec(documents).get("enableInTreeAutoscaling"))
    if pod.spec.get("automountServiceAccountToken", True) is not wanted:
        yield f"automountServiceAccountToken must be {str(wanted).lower()}"
