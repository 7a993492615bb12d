"""The pods of documents that are no RayService: Pods, and what Deployments and StatefulSets are to have."""

from __future__ import annotations

from copy import deepcopy

from tests.k8s.lookalike.documents import Document, Manifests


def pods(manifests: Manifests) -> list[Document]:
    """With names and namespaces. Pods of a Deployment are numbered like those of a StatefulSet."""
    found = manifests.of_kind("Pod")
    for owner in (*manifests.of_kind("Deployment"), *manifests.of_kind("StatefulSet")):
        found += [pod(owner, number) for number in range(owner["spec"].get("replicas", 1))]
    return found


def pod(owner: Document, number: int) -> Document:
    template = deepcopy(owner["spec"]["template"])
    name = f"{owner['metadata']['name']}-{number}"
    namespace = owner["metadata"].get("namespace", "default")
    template["metadata"] = {**template.get("metadata", {}), "name": name, "namespace": namespace}
    for claim in owner["spec"].get("volumeClaimTemplates", []):
        volume = claim["metadata"]["name"]
        source = {"persistentVolumeClaim": {"claimName": f"{volume}-{name}"}}
        template["spec"].setdefault("volumes", []).append({"name": volume, **source})
    return template
