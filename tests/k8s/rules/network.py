"""Ports, Services, routes and NetworkPolicies: who reaches what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.k8s.rules.manifests import Document, Pod, cluster_spec, of_kind, one, pods, read_yaml, serve_document

H2C = "kubernetes.io/h2c"
DASHBOARD, GCS, METRICS, AGENT = 8265, 6379, 8080, 52365
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
KUBE_DNS = {"k8s-app": "kube-dns"}


def network_findings(documents: Sequence[Document]) -> Iterator[str]:
    yield from ports(documents)
    yield from routes(documents)
    yield from policies(documents)
    yield from monitors(documents)
    yield from scrapes(documents)


def served_ports(documents: Sequence[Document]) -> dict[str, int]:
    """As serveConfigV2 has them, by the names that KubeRay's Service takes up."""
    document = serve_document(documents)
    return {"serve": document["http_options"]["port"], "serve-grpc": document["grpc_options"]["port"]}


def ports(documents: Sequence[Document]) -> Iterator[str]:
    wanted = served_ports(documents)
    spec = one(documents, "RayService")["spec"]
    host = serve_document(documents)["http_options"]["host"]
    if host not in ("0.0.0.0", "::"):
        yield f"http.host: found {host}; in a pod it must be 0.0.0.0"
    for pod in pods(documents):
        if pod.ray:
            given = {port["name"]: port["containerPort"] for port in pod.main.get("ports", [])}
            need = wanted | {"metrics": METRICS}
            need |= {"gcs": GCS, "dashboard": DASHBOARD} if pod.head else {}
            for name, port in need.items():
                if given.get(name) != port:
                    yield f"{pod.where}: container port {name} is {given.get(name)}, expected {port}"
    service = {port["name"]: port for port in spec["serveService"]["spec"]["ports"]}
    for name, port in wanted.items():
        if service.get(name, {}).get("port") != port or service[name].get("targetPort", port) != port:
            yield f"serveService: port {name} is not {port}"
    if service.get("serve-grpc", {}).get("appProtocol") != H2C:
        yield f"serveService: appProtocol of serve-grpc is not {H2C}"
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "excludeHeadPodFromServeSvc is not true: the head's death would cut clients"


def routes(documents: Sequence[Document]) -> Iterator[str]:
    """What routes lead to: KubeRay's Service, and for gRPC its gRPC port."""
    service = one(documents, "RayService")["spec"]["serveService"]["metadata"]["name"]
    wanted = served_ports(documents)
    for kind, name in (("HTTPRoute", "serve"), ("GRPCRoute", "serve-grpc")):
        for route in of_kind(documents, kind):
            for backend in (each for rule in route["spec"]["rules"] for each in rule["backendRefs"]):
                if (backend["name"], backend["port"]) != (service, wanted[name]):
                    found = f"{backend['name']}:{backend['port']}"
                    yield f"{kind}: leads to {found}, expected {service}:{wanted[name]}"


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Of matchLabels and of matchExpressions with In."""
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions), "only In is known here"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


class Peer:
    """Who may be let in or out. `namespace`: its labels; None is the cluster's own."""

    def __init__(self, labels: dict[str, str], namespace: dict[str, str] | None = None) -> None:
        self.labels, self.namespace = labels, namespace

    def is_in(self, peers: Sequence[Document] | None) -> bool:
        return not peers or any(self.is_one(peer) for peer in peers)

    def is_one(self, peer: Document) -> bool:
        if "ipBlock" in peer:
            return False
        in_namespace = "namespaceSelector" not in peer if self.namespace is None else self.of_namespace(peer)
        return in_namespace and matches(peer.get("podSelector", {}), self.labels)

    def of_namespace(self, peer: Document) -> bool:
        return "namespaceSelector" in peer and matches(peer["namespaceSelector"], self.namespace or {})


STRANGER = Peer({"app": "stranger"}, {"kubernetes.io/metadata.name": "elsewhere"})


def lets(documents: Sequence[Document], direction: str, pod: Pod, peer: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies together let `peer` reach the pod (ingress), or the pod reach `peer` (egress)."""
    policies = [each["spec"] for each in of_kind(documents, "NetworkPolicy")]
    own = [each for each in policies if matches(each["podSelector"], pod.labels)]
    own = [each for each in own if direction.capitalize() in each["policyTypes"]]
    if not own:
        return True
    key = "from" if direction == "ingress" else "to"
    rules: list[Document] = [rule for each in own for rule in each.get(direction, [])]
    return any(peer.is_in(rule.get(key)) and on_port(rule.get("ports"), port, protocol) for rule in rules)


def on_port(given: Sequence[Document] | None, port: int, protocol: str) -> bool:
    def one_of(each: Document) -> bool:
        first: Any = each.get("port", port)
        return bool(each.get("protocol", "TCP") == protocol and first <= port <= each.get("endPort", first))

    return not given or any(map(one_of, given))


def policies(documents: Sequence[Document]) -> Iterator[str]:
    """Ray's pods reach each other on every port, Serve starts and is reached, and a stranger reaches nothing else."""
    own = pods(documents)
    (head, *_) = (pod for pod in own if pod.head)
    operator = Peer(OPERATOR, {"kubernetes.io/metadata.name": "kuberay"})
    for pod in own:
        for other in own:
            peer = Peer(other.labels)
            for port in (GCS, DASHBOARD, 10002, 30000, 40000) if pod.ray else (GCS,):
                if not lets(documents, "ingress", pod, peer, port) or not lets(
                    documents, "egress", other, Peer(pod.labels), port
                ):
                    yield f"NetworkPolicy: {other.where} does not reach {pod.where} on port {port}"
        dns = Peer(KUBE_DNS, {"kubernetes.io/metadata.name": "kube-system"})
        if not all(lets(documents, "egress", pod, dns, 53, protocol) for protocol in ("UDP", "TCP")):
            yield f"NetworkPolicy: {pod.where} does not reach DNS"
        for port in served_ports(documents).values():
            if pod.ray and not lets(documents, "ingress", pod, STRANGER, port):
                yield f"NetworkPolicy: clients do not reach {pod.where} on port {port}"
        for port in (GCS, DASHBOARD, 10001, 10002, AGENT, METRICS, 30000, 40000):
            if lets(documents, "ingress", pod, STRANGER, port):
                yield f"NetworkPolicy: a stranger reaches {pod.where} on port {port}"
    if not lets(documents, "ingress", head, operator, DASHBOARD):
        yield f"NetworkPolicy: KubeRay's operator does not reach the head on port {DASHBOARD}"
    api = Peer({}, {"kubernetes.io/metadata.name": "default"})
    if cluster_spec(documents).get("enableInTreeAutoscaling") and not lets(documents, "egress", head, api, 443):
        yield "NetworkPolicy: the autoscaler does not reach the API server"


def monitors(documents: Sequence[Document]) -> Iterator[str]:
    """A PodMonitor chooses every pod of Ray's, names a port of theirs, and Prometheus reaches it."""
    prometheus = Peer({"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
    for monitor in of_kind(documents, "PodMonitor"):
        for pod in (each for each in pods(documents) if each.ray):
            given = {port["name"]: port["containerPort"] for port in pod.main.get("ports", [])}
            if not matches(monitor["spec"]["selector"], pod.labels):
                yield f"PodMonitor: does not choose {pod.where}"
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                port = given.get(endpoint["port"])
                if port is None:
                    yield f"PodMonitor: {pod.where} has no port {endpoint['port']}"
                elif not lets(documents, "ingress", pod, prometheus, port):
                    yield f"NetworkPolicy: Prometheus does not reach {pod.where} on port {port}"


def scrapes(documents: Sequence[Document]) -> Iterator[str]:
    """A ScrapeConfig names the Service's HTTP port, and a key where keys are asked for."""
    service = one(documents, "RayService")["spec"]["serveService"]["metadata"]["name"]
    (namespace,) = (each["metadata"]["name"] for each in of_kind(documents, "Namespace"))
    expected = f"{service}.{namespace}.svc:{served_ports(documents)['serve']}"
    config = read_yaml(one(documents, "ConfigMap", "nibble-config")["data"]["nibble.yaml"])
    for scrape in (each["spec"] for each in of_kind(documents, "ScrapeConfig")):
        targets = [target for each in scrape["staticConfigs"] for target in each["targets"]]
        if targets != [expected]:
            yield f"ScrapeConfig: targets are {targets}, expected {expected} alone: one scrape has all series"
        if config.get("auth", {}).get("api_keys_file") and "authorization" not in scrape:
            yield "ScrapeConfig: auth.api_keys_file is set, and a scrape has no key"
