"""A container's variables, as the kubelet resolves them."""

from __future__ import annotations

import base64
import math
import re
from typing import TYPE_CHECKING

from tests.k8s.lookalike.documents import Document, Manifests, quantity

if TYPE_CHECKING:
    from tests.k8s.lookalike.kubelet.pods import Pod


def resolved(container: Document, pod: Pod, manifests: Manifests) -> dict[str, str]:
    """envFrom first, then env, whose values may name what stands before them: $(NAME). Raises ValueError for a
    reference to what is not there."""
    variables: dict[str, str] = {}
    for source in container.get("envFrom", []):
        kind = "ConfigMap" if "configMapRef" in source else "Secret"
        reference = source["configMapRef" if kind == "ConfigMap" else "secretRef"]
        for name, value in values(manifests, kind, reference, pod.namespace).items():
            variables[source.get("prefix", "") + name] = value.decode()
    for entry in container.get("env", []):
        value = (
            entry.get("value", "") if "valueFrom" not in entry else found(entry["valueFrom"], container, pod, manifests)
        )
        if value is not None:
            variables[entry["name"]] = expanded(value, variables)
    return variables


def expanded(text: str, variables: dict[str, str]) -> str:
    """$(NAME) by its value, where it is known; $$ is a single $."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]+)\)", replace, text)


def found(source: Document, container: Document, pod: Pod, manifests: Manifests) -> str | None:
    if "fieldRef" in source:
        return field(source["fieldRef"]["fieldPath"], pod)
    if "resourceFieldRef" in source:
        _, name = source["resourceFieldRef"]["resource"].split(".")
        return str(math.ceil(quantity(container["resources"]["limits"][name])))
    kind, key = ("ConfigMap", "configMapKeyRef") if "configMapKeyRef" in source else ("Secret", "secretKeyRef")
    reference = source[key]
    value = values(manifests, kind, reference, pod.namespace).get(reference["key"])
    if value is None and not reference.get("optional"):
        raise ValueError(f"{kind} {reference['name']}: has no key {reference['key']}")
    return None if value is None else value.decode()


def field(path: str, pod: Pod) -> str:
    """Of the downward API. Raises ValueError for one that the look-alike does not know."""
    if labelled := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
        return pod.labels[labelled[1]]
    known = {"metadata.name": pod.name, "metadata.namespace": pod.namespace, "status.podIP": pod.address}
    if path not in known:
        raise ValueError(f"fieldPath: found {path!r}, allowed are labels and {', '.join(known)}")
    return known[path]


def values(manifests: Manifests, kind: str, reference: Document, namespace: str) -> dict[str, bytes]:
    """Of a ConfigMap or a Secret; raises ValueError where it is not there and not optional."""
    name = reference.get("name") or reference["secretName"]
    document = manifests.get(kind, name, namespace)
    if document is None:
        if reference.get("optional"):
            return {}
        raise ValueError(f"{kind} {name}: not in namespace {namespace}, and not optional")
    if kind == "ConfigMap":
        binary = {key: base64.b64decode(value) for key, value in document.get("binaryData", {}).items()}
        return {key: value.encode() for key, value in document.get("data", {}).items()} | binary
    plain = {key: value.encode() for key, value in document.get("stringData", {}).items()}
    return {key: base64.b64decode(value) for key, value in document.get("data", {}).items()} | plain
