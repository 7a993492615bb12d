"""Each rule finds what it is for: a manifest that is broken in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.rules.findings import findings
from tests.k8s.rules.manifests import Document, one, overlay, serve_document
from tests.k8s.rules.schema import VERSIONS, broken_rules, schema_findings

CLUSTER = "spec.rayClusterConfig"
HEAD, WORKER = f"{CLUSTER}.headGroupSpec", f"{CLUSTER}.workerGroupSpecs.0"
HEAD_POD, WORKER_POD = f"{HEAD}.template.spec", f"{WORKER}.template.spec"
HEAD_CONTAINER, WORKER_CONTAINER = f"{HEAD_POD}.containers.0", f"{WORKER_POD}.containers.0"
DELETED: Any = object()
NONE: dict[str, Any] = {}


class Broken:
    """`path` of a document is set to `value`, which may be a function of what was there, or DELETED; then some finding
    has `told` in it."""

    def __init__(self, told: str, path: str, value: Any, kind: str = "RayService", on: str = "prod", **of: Any) -> None:
        self.told, self.path, self.value, self.kind, self.overlay = told, path, value, kind, on
        self.name: str | None = of.get("name")

    def documents(self) -> list[Document]:
        documents = overlay(self.overlay)
        *parents, last = self.path.split(".")
        target: Any = one(documents, self.kind, self.name)
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key.replace("~", "."), {})
        place: Any = int(last) if isinstance(target, list) else last.replace("~", ".")
        if self.value is DELETED:
            del target[place]
        else:
            target[place] = self.value(target[place]) if callable(self.value) else self.value
        return documents


def without(name: str) -> Callable[[list[Document]], list[Document]]:
    return lambda items: [each for each in items if each["name"] != name]


def plus(*more: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda items: [*items, *more]


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


SCHEMA = [
    Broken("'replica' was unexpected", f"{WORKER}.replica", 2),
    Broken("is not of type 'boolean'", "spec.excludeHeadPodFromServeSvc", "yes"),
    Broken("'tolerations' was unexpected", f"{WORKER_CONTAINER}.tolerations", []),
    Broken("appears more than once", f"{WORKER_CONTAINER}.ports", plus({"name": "x", "containerPort": 8000})),
    Broken("'http' is not one of", "spec.rules.0.filters", [{"type": "http"}], kind="HTTPRoute"),
    Broken("filter cannot be repeated", "spec.rules.0.filters",
           [{"type": "RequestRedirect", "requestRedirect": NONE}] * 2, kind="HTTPRoute"),
    Broken("request timeout", "spec.rules.0.timeouts", {"request": "10s", "backendRequest": "20s"}, kind="HTTPRoute"),
    Broken("managedBy field value must be", "spec.managedBy", "someone"),
    Broken("'intervall' was unexpected", "spec.groups.0.intervall", "1m", kind="PrometheusRule"),
    Broken("'podMetricEndpoints' was unexpected", "spec.podMetricEndpoints", [], kind="PodMonitor"),
    Broken("Kubernetes 1.30", "spec.minimum", 1, kind="PodDisruptionBudget"),
    Broken("Kubernetes 1.37", "spec.podSelector.matchLabel", {"a": "b"}, kind="NetworkPolicy", name="nibble"),
    Broken("Kubernetes 1.30", f"{WORKER_POD}.topologySpreadConstraints.0.maxSkew", DELETED),
]  # fmt: skip

KUBERAY = [
    Broken("at most 47 characters", "metadata.name", "n" * 48),
    Broken("must be a DNS label", "metadata.name", "9nibble"),
    Broken("found Rolling, allowed are", "spec.upgradeStrategy.type", "Rolling"),
    Broken("rayClusterConfig.upgradeStrategy", f"{CLUSTER}.upgradeStrategy", {"type": "Recreate"}),
    Broken("headService.metadata.name", f"{HEAD}.headService", {"metadata": {"name": "mine"}}),
    Broken("enableK8sTokenAuth", f"{CLUSTER}.authOptions", {"mode": "token", "enableK8sTokenAuth": True}),
    Broken("both rayStartParams and resources", f"{HEAD}.resources", {"CPU": "1"}),
    Broken("rayStartParams.labels is not supported", f"{WORKER}.rayStartParams.labels", "a=b"),
    Broken("is no label", f"{WORKER}.labels", {"nibble/isa": "avx 2"}),
    Broken("must be set without the autoscaler", f"{WORKER}.maxReplicas", DELETED, on="dev"),
    Broken("must be 0 or more, and in order", f"{WORKER}.minReplicas", 13),
    Broken("must be 0 or more, and in order", f"{WORKER}.minReplicas", -1),
    Broken("replicas 20 is not within", f"{WORKER}.replicas", 20),
    Broken("suspend needs", f"{WORKER}.suspend", True),
    Broken("idleTimeoutSeconds needs", f"{WORKER}.idleTimeoutSeconds", 60, on="dev"),
    Broken("idleTimeoutSeconds needs", f"{WORKER}.idleTimeoutSeconds", -1),
    Broken("priority needs", f"{WORKER}.priority", 5, on="dev"),
    Broken("restartPolicy: found Always", f"{WORKER_POD}.restartPolicy", "Always"),
    Broken("autoscalerOptions.idleTimeoutSeconds is negative", f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds", -1),
    Broken("the operator's own", f"{CLUSTER}.autoscalerOptions.env",
           plus({"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"})),
    Broken("RAY_enable_autoscaler_v2", f"{HEAD_CONTAINER}.env",
           plus({"name": "RAY_enable_autoscaler_v2", "value": "1"})),
    Broken("gcsFaultToleranceOptions alone", f"{HEAD_CONTAINER}.env",
           plus({"name": "RAY_REDIS_ADDRESS", "value": "r"})),
    Broken("Ray counts those of the container", f"{WORKER}.resources", {"CPU": "8"}),
    Broken("gcsFaultToleranceOptions alone", f"{HEAD}.rayStartParams.redis-password", "secret"),
    Broken("are both set", "metadata.annotations", {"ray.io/ft-enabled": "true"}),
    Broken("for backend rocksdb alone", f"{CLUSTER}.gcsFaultToleranceOptions.storage", {"size": "1Gi"}),
    Broken("group names must differ", f"{CLUSTER}.workerGroupSpecs.1.groupName", "avx2", on="isa"),
]  # fmt: skip

PODS = [
    Broken("enforce is None", "metadata.labels", NONE, kind="Namespace"),
    Broken("enforce is restricted; restricted without hostPath", f"{WORKER_POD}.volumes",
           plus({"name": "host", "hostPath": {"path": "/"}})),
    Broken("hostNetwork is set", f"{WORKER_POD}.hostNetwork", True),
    Broken("nfs is not allowed", f"{HEAD_POD}.volumes", plus({"name": "n", "nfs": {"server": "s", "path": "/"}})),
    Broken("sysctls are set", f"{HEAD_POD}.securityContext.sysctls", [{"name": "net.core.somaxconn", "value": "9"}]),
    Broken("privileged", f"{HEAD_CONTAINER}.securityContext.privileged", True),
    Broken("allowPrivilegeEscalation", f"{WORKER_CONTAINER}.securityContext.allowPrivilegeEscalation", DELETED),
    Broken("readOnlyRootFilesystem", f"{WORKER_CONTAINER}.securityContext.readOnlyRootFilesystem", False),
    Broken("capabilities: must drop ALL", f"{HEAD_CONTAINER}.securityContext.capabilities", {"add": ["SYS_PTRACE"]}),
    Broken("runAsNonRoot", f"{WORKER_POD}.securityContext.runAsNonRoot", DELETED),
    Broken("runAsUser is 0", f"{WORKER_POD}.securityContext.runAsUser", 0),
    Broken("seccompProfile", f"{HEAD_POD}.securityContext.seccompProfile", {"type": "Unconfined"}),
    Broken("hostPort is set", f"{WORKER_CONTAINER}.ports.1.hostPort", 8000),
    Broken("container autoscaler: capabilities", f"{CLUSTER}.autoscalerOptions.securityContext", NONE),
    Broken("container autoscaler: cpu is 500m", f"{CLUSTER}.autoscalerOptions.resources", DELETED),
    Broken("container autoscaler: envFrom lacks", f"{CLUSTER}.autoscalerOptions.envFrom", DELETED),
    Broken("container autoscaler: mounts no /tmp", f"{CLUSTER}.autoscalerOptions.volumeMounts", DELETED),
    Broken("StatefulSet nibble-redis: container redis: cpu is 100m", "spec.template.spec.containers.0.resources",
           {key: {"cpu": "100m", "memory": "512Mi"} for key in ("requests", "limits")}, kind="StatefulSet"),
    Broken("no container port 6380", "spec.template.spec.containers.0.readinessProbe", {"tcpSocket": {"port": 6380}},
           kind="StatefulSet"),
    Broken("requests must be limits", f"{WORKER_CONTAINER}.resources.requests.cpu", "7"),
    Broken("requests must be limits", f"{HEAD_CONTAINER}.resources.limits.memory", "9Gi"),
    Broken("cpu is 7500m, must be whole CPUs", f"{WORKER_CONTAINER}.resources",
           {key: {"cpu": "7500m", "memory": "32Gi"} for key in ("requests", "limits")}),
    Broken("/dev/shm is no emptyDir of medium Memory", f"{WORKER_POD}.volumes.0.emptyDir.medium", DELETED),
    Broken("object-store-memory is", f"{WORKER}.rayStartParams.object-store-memory", "9999999999"),
    Broken("object-store-memory is 0", f"{WORKER}.rayStartParams.object-store-memory", DELETED),
    Broken("do not fit in memory", f"{WORKER_POD}.volumes.0.emptyDir.sizeLimit", "31Gi"),
    Broken("volumes and mounts differ in tmp", f"{HEAD_CONTAINER}.volumeMounts", without("tmp"), on="dev"),
    Broken("there is no ConfigMap other", f"{WORKER_POD}.volumes.3.configMap.name", "other"),
    Broken("nobody makes Secret other", f"{WORKER_POD}.volumes.4.secret.secretName", "other"),
    Broken("nobody makes Secret other", f"{WORKER_CONTAINER}.envFrom", plus({"secretRef": {"name": "other"}})),
    Broken("/tmp is not writable", f"{WORKER_CONTAINER}.volumeMounts.1.readOnly", True),
    Broken("HOME is not /tmp", f"{WORKER_CONTAINER}.env", []),
    Broken("readinessProbe: asks /readyz", f"{WORKER_CONTAINER}.readinessProbe.httpGet.path", "/readyz"),
    Broken("readinessProbe: asks /-/healthz on port 9000", f"{WORKER_CONTAINER}.readinessProbe.httpGet.port",
           "serve-grpc"),
    Broken("readinessProbe: fails after 5 s", f"{WORKER_CONTAINER}.readinessProbe.failureThreshold", 1),
    Broken("readinessProbe: fails after 60 s", f"{WORKER_CONTAINER}.readinessProbe.failureThreshold", 12),
    Broken("readinessProbe: asks None", f"{WORKER_CONTAINER}.readinessProbe", {"exec": {"command": ["true"]}}),
    Broken("livenessProbe: asks /api/healthz on port 52365, expected /api/healthz on 1234",
           f"{HEAD}.rayStartParams.dashboard-agent-listen-port", "1234"),
    Broken("livenessProbe: asks None", f"{WORKER_CONTAINER}.livenessProbe", DELETED),
    Broken("automountServiceAccountToken must be true", f"{HEAD_POD}.automountServiceAccountToken", False),
    Broken("automountServiceAccountToken must be false", f"{WORKER_POD}.automountServiceAccountToken", DELETED),
]  # fmt: skip

NETWORK = [
    Broken("container port serve is None", f"{WORKER_CONTAINER}.ports", without("serve")),
    Broken("container port metrics is None", f"{HEAD_CONTAINER}.ports", without("metrics")),
    Broken("container port serve-grpc is 9001", f"{HEAD_CONTAINER}.ports.5.containerPort", 9001),
    Broken("port serve is not 8000", "spec.serveService.spec.ports.0.targetPort", 8080),
    Broken("appProtocol of serve-grpc", "spec.serveService.spec.ports.1.appProtocol", DELETED),
    Broken("excludeHeadPodFromServeSvc", "spec.excludeHeadPodFromServeSvc", DELETED),
    Broken("HTTPRoute: leads to nibble:8000", "spec.rules.0.backendRefs.0.name", "nibble", kind="HTTPRoute"),
    Broken("GRPCRoute: leads to nibble-serve-svc:8000", "spec.rules.0.backendRefs.0.port", 8000, kind="GRPCRoute"),
    Broken("group workers does not reach head on port 6379", "spec.ingress.0.from.0.podSelector.matchLabels",
           {"ray.io/node-type": "head"}, kind="NetworkPolicy", name="nibble"),
    Broken("head does not reach group workers", "spec.egress.0.to.0.podSelector.matchLabels",
           {"ray.io/node-type": "head"}, kind="NetworkPolicy", name="nibble"),
    Broken("does not reach DNS", "spec.egress.1.ports", lambda ports: ports[:1], kind="NetworkPolicy", name="nibble"),
    Broken("clients do not reach group workers on port 9000", "spec.ingress.1.ports", lambda ports: ports[:1],
           kind="NetworkPolicy", name="nibble"),
    Broken("a stranger reaches group workers on port 8080", "spec.ingress.1.ports",
           plus({"protocol": "TCP", "port": 8080}), kind="NetworkPolicy", name="nibble"),
    Broken("a stranger reaches head on port 6379", "spec.ingress.0.from", DELETED, kind="NetworkPolicy", name="nibble"),
    Broken("a stranger reaches head on port 8265", "spec.ingress.0.from", DELETED, kind="NetworkPolicy",
           name="nibble-operator"),
    Broken("a stranger reaches StatefulSet nibble-redis", "spec.template.metadata.labels",
           {"app.kubernetes.io/name": "nibble-redis"}, kind="StatefulSet"),
    Broken("operator does not reach the head", "spec.podSelector.matchLabels", {"ray.io/node-type": "worker"},
           kind="NetworkPolicy", name="nibble-operator"),
    Broken("the autoscaler does not reach the API server", "spec.egress.2", DELETED, kind="NetworkPolicy",
           name="nibble"),
    Broken("a scrape has no key", "spec.authorization", DELETED, kind="ScrapeConfig"),
    Broken("expected nibble-serve-svc.nibble.svc:8000 alone", "spec.staticConfigs.0.targets", ["other:8000"],
           kind="ScrapeConfig"),
    Broken("PodMonitor: head has no port http", "spec.podMetricsEndpoints.0.port", "http", kind="PodMonitor"),
    Broken("PodMonitor: does not choose head", "spec.selector.matchExpressions.0.values", ["worker"],
           kind="PodMonitor"),
    Broken("Prometheus does not reach head on port 8080", "spec.ingress.0.ports.0.port", 8081, kind="NetworkPolicy",
           name="nibble-metrics"),
]  # fmt: skip

TOGETHER = [
    Broken("is not in namespace nibble", "metadata.namespace", "default", kind="PodMonitor"),
    Broken("serveConfigV2 is not what", "data.nibble~yaml", replaced("replicas: 3", "replicas: 2"), kind="ConfigMap",
           name="nibble-config"),
    Broken("serveConfigV2 is not what", "spec.serveConfigV2", replaced("num_replicas: 3", "num_replicas: 2")),
    Broken("Serve does not know applications.deployments.num_replica", "spec.serveConfigV2",
           replaced("num_replicas: 3", "num_replica: 3")),
    Broken("is not what cluster/serve_settings.py lists", "data.RAY_SERVE_ENABLE_HA_PROXY", "0", kind="ConfigMap",
           name="nibble-serve-settings"),
    Broken("group workers, container ray-worker: envFrom lacks", f"{WORKER_CONTAINER}.envFrom", []),
    Broken("env overrides RAY_SERVE_ENABLE_HA_PROXY", f"{WORKER_CONTAINER}.env",
           plus({"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "0"})),
    Broken("rayVersion: found 2.59.0", f"{CLUSTER}.rayVersion", "2.59.0"),
    Broken("must have one image", f"{WORKER_CONTAINER}.image", "nibble-serve:0.2.0"),
    Broken("group workers: terminationGracePeriodSeconds is 600", f"{WORKER_POD}.terminationGracePeriodSeconds", 600),
    Broken("head: terminationGracePeriodSeconds is 30", f"{HEAD_POD}.terminationGracePeriodSeconds", DELETED),
    Broken("group workers: preStop is ''", f"{WORKER_CONTAINER}.lifecycle", DELETED),
    Broken("expected nibble drain", f"{WORKER_CONTAINER}.volumeMounts.3.mountPath", "/etc/other"),
    Broken("rayClusterDeletionDelaySeconds is 60", "spec.rayClusterDeletionDelaySeconds", DELETED),
    Broken("timeouts.request is 600s", "spec.rules.0.timeouts.request", "600s", kind="HTTPRoute"),
    Broken("no route for gRPC", "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade"),
    Broken("is no volume of its own", f"{WORKER_CONTAINER}.volumeMounts.2.mountPath", "/var/cache/other"),
    Broken("is in no Secret's folder", f"{WORKER_CONTAINER}.volumeMounts.4.mountPath", "/etc/other"),
    Broken("envFrom lacks Secret nibble-s3", f"{WORKER_CONTAINER}.envFrom", lambda sources: sources[:1]),
    Broken("num-cpus is not", f"{HEAD}.rayStartParams.num-cpus", DELETED),
    Broken("models bloom: no node has the label nibble/isa=avx2", f"{WORKER}.labels", {"nibble/isa": "avx"}, on="isa"),
    Broken("1 threads, a worker has at most 0 CPUs", f"{WORKER}.rayStartParams.num-cpus", "0", on="dev"),
    Broken("their replicas need 4 CPUs, the workers have 2", f"{WORKER}.rayStartParams.num-cpus", DELETED, on="dev"),
    Broken("router.nodes: it must run on workers", "data.nibble~yaml", replaced('"!headgroup"', "headgroup"),
           kind="ConfigMap", name="nibble-config"),
    Broken("only an integer minAvailable", "spec.minAvailable", "50%", kind="PodDisruptionBudget"),
    Broken("3 of 3 workers: no node could be drained", "spec.minAvailable", 3, kind="PodDisruptionBudget"),
    Broken("2 of 0 workers", "spec.selector.matchLabels", {"app": "other"}, kind="PodDisruptionBudget"),
]  # fmt: skip


@pytest.mark.parametrize("broken", [*SCHEMA, *KUBERAY, *PODS, *NETWORK, *TOGETHER], ids=lambda each: each.told)
def test_what_is_broken_in_one_place_is_found(broken: Broken) -> None:
    found = findings(broken.documents(), (VERSIONS[0], VERSIONS[-1]))
    assert any(broken.told in finding for finding in found), found


def test_a_cel_rule_that_cannot_be_evaluated_is_no_rule_that_holds() -> None:
    schema = {"x-kubernetes-validations": [{"rule": "self.a > 1", "message": "a must be more than 1"}]}
    assert broken_rules(schema, {"a": 1}, "$") == ["$: a must be more than 1"]
    assert broken_rules(schema, {"a": 2}, "$") == []
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        broken_rules({"x-kubernetes-validations": [{"rule": "self.a.unknown()"}]}, {"a": 1}, "$")


def test_a_kind_without_a_schema_is_no_sound_document() -> None:
    (found, *_) = schema_findings({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "t"}})
    assert "Couldn't find schema" in found


def test_changing_a_copy_changes_no_other() -> None:
    changed = overlay("dev")
    one(changed, "RayService")["spec"].clear()
    assert serve_document(overlay("dev"))
